"""The command line: ``sparseattn compare | eval | generate | info | version``.

Exit codes: 0 done, 2 wrong input (one sentence), 130 interrupted (what is finished is kept).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

__all__ = ["main"]

WRONG_INPUT = 2
INTERRUPTED = 130

COMPARE_EXAMPLE = """\
examples:
  sparseattn compare
  sparseattn compare --model FOLDER --text FILE --attention window:64 --attention topk:16 \\
      --tokens 20000 --save out/
  sparseattn compare --attention window:64 --tokens 3000 --time-budget 2

Run the same command again to go on after an interrupt (with --save), or to see the table.
"""
EVAL_EXAMPLE = "example:\n  sparseattn eval --attention window:64 --tokens 3000"
GENERATE_EXAMPLE = """\
examples:
  sparseattn generate "The list of" --max-new-tokens 60
  sparseattn generate "Once upon a time" --model FOLDER --temperature 0.8 --top-p 0.95 --seed 1 \\
      --attention window:64

Prints what follows the prompt, as it is decoded; - reads the prompt from standard input.
"""
INFO_EXAMPLE = "example:\n  sparseattn info --threads 2"
VERSION_EXAMPLE = "example:\n  sparseattn version --json"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit code."""
    try:
        options = make_parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = options.run
        code = run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return interrupted("interrupted")
    except BrokenPipeError:
        silence_stdout()
        return 0
    except Exception as error:
        return wrong_input(error)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    parser = Parser(
        prog="sparseattn",
        description="Sparse attention on the CPU: variants compared on a real checkpoint.",
    )
    parser.add_argument("--version", action="version", version=f"sparseattn {version()}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary, example, add, run in (
        (
            "compare",
            "compare attention variants on a checkpoint: quality, cost, memory",
            COMPARE_EXAMPLE,
            add_compare,
            run_compare,
        ),
        ("eval", "perplexity of a checkpoint under one variant", EVAL_EXAMPLE, add_eval, run_eval),
        (
            "generate",
            "continue a prompt with a checkpoint under one variant",
            GENERATE_EXAMPLE,
            add_generate,
            run_generate,
        ),
        ("info", "what runs here: versions, threads, BLAS, variants", INFO_EXAMPLE, None, run_info),
        ("version", "the version", VERSION_EXAMPLE, None, run_version),
    ):
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if add is not None:
            add(verb)
        add_common(verb)
        verb.set_defaults(run=run)
    return parser


class Parser(argparse.ArgumentParser):
    """Wrong usage is one sentence on stderr and exit code 2; a prefix of an option is no option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Refuse what is unknown where it is found: by the verb, which knows its options."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            from sparseattn.variants.base import nearest

            known = [name for action in self._actions for name in action.option_strings]
            near = nearest(unknown[0].partition("=")[0], known, cutoff=0.6)
            offer = f": did you mean {near[0]}?" if near else ""
            if not unknown[0].startswith("-"):
                offer = ": put a text of several words into quotes"
            self.error(f"no argument {' '.join(unknown)} is known{offer}")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        """End with the sentence."""
        self.exit(WRONG_INPUT, f"{self.prog}: {message} (see {self.prog} --help)\n")


class Once(argparse.Action):
    """An option whose second mention would otherwise replace the first without a word."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: Any = None) -> None:
        """Take the value."""
        seen = namespace.__dict__.setdefault("_seen", set())
        if self.dest in seen:
            raise argparse.ArgumentError(self, "takes one here; compare takes several")
        seen.add(self.dest)
        setattr(namespace, self.dest, value)


def add_common(verb: argparse.ArgumentParser) -> None:
    """Add what every verb takes."""
    group = verb.add_argument_group("for every verb")
    group.add_argument("--json", action="store_true", help="print JSON instead of text")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of everything random (0)")
    group.add_argument("--threads", type=int, metavar="N", help="of the kernels (all cores)")
    group.add_argument("--save", metavar="DIR", help="folder for the results")


def add_model(verb: argparse.ArgumentParser) -> None:
    """Add the options that say which model."""
    group = verb.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="DIR",
        help="Hugging Face folder with config.json, model.safetensors and a tokenizer "
        "(GPT-2, LLaMA, Mistral, Qwen2, Qwen3, GPT-NeoX, BERT and its kin); the embedded model if "
        "unset",
    )
    group.add_argument(
        "--random-weights", type=int, metavar="SEED", help="draw the weights: config.json is enough"
    )
    group.add_argument(
        "--tokenizer", metavar="DIR", help="folder or tokenizer.json, instead of the model's"
    )


def add_text(verb: argparse.ArgumentParser) -> None:
    """Add the options of verbs that run a model on a text."""
    add_model(verb)
    group = verb.add_argument_group("text")
    group.add_argument("--text", metavar="FILE", help="UTF-8 text; the default text if unset")
    group.add_argument(
        "--tokens", type=count_or_all, default=20_000, metavar="N", help="at most, or all (20000)"
    )
    group.add_argument(
        "--context", type=int, metavar="N", help="tokens of a block (the model's, up to 1024)"
    )
    group.add_argument(
        "--stride", type=int, metavar="N", help="from block to block (the context: no overlap)"
    )


def add_compare(verb: argparse.ArgumentParser) -> None:
    """Add the options of compare."""
    add_text(verb)
    group = verb.add_argument_group("comparison")
    group.add_argument(
        "--attention",
        action="append",
        metavar="SPEC",
        help="a variant such as window:64 or topk:16; give it several times (sparseattn info "
        "lists all; default: dense, window:64, topk:16; of an encoder, a window of both sides)",
    )
    group.add_argument(
        "--budgets",
        type=numbers,
        default=(),
        metavar="B,...",
        help="add rows that keep these shares of the visible pairs, such as 0.5,0.25, and their "
        "bounds",
    )
    group.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="runs of specs with randomness (1)"
    )
    group.add_argument(
        "--max-kl",
        type=float,
        default=0.01,
        metavar="NATS",
        help="for the advice (0.01); of embeddings, 1 - cosine",
    )
    group.add_argument(
        "--lengths", type=integers, metavar="N,...", help="lengths to time (512 to 65536, doubling)"
    )
    group.add_argument(
        "--time-budget",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="for all timing; 0: no timing (30)",
    )


def add_eval(verb: argparse.ArgumentParser) -> None:
    """Add the options of eval."""
    add_text(verb)
    add_spec(verb)


def add_spec(verb: Any) -> None:
    """Add the one variant of verbs that run one."""
    verb.add_argument(
        "--attention", action=Once, default="dense", metavar="SPEC", help="a variant (dense)"
    )


def add_generate(verb: argparse.ArgumentParser) -> None:
    """Add the options of generate."""
    verb.add_argument("prompt", metavar="PROMPT", nargs="?", default="", help="text to continue")
    add_model(verb)
    group = verb.add_argument_group("generation")
    add_spec(group)
    group.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="at most so many (128)"
    )
    group.add_argument(
        "--temperature", type=float, metavar="T", help="draw tokens; the likeliest ones if unset"
    )
    group.add_argument("--top-k", type=int, metavar="K", help="from the K likeliest (all)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="from the likeliest of share P together (all)"
    )
    group.add_argument(
        "--stop",
        action="append",
        metavar="TEXT",
        help="end before this text; several times for several",
    )


# ---- verbs -------------------------------------------------------------------------------------


def run_compare(options: argparse.Namespace) -> int:
    """Compare; after an interrupt, say what is finished."""
    from sparseattn.evaluation.compare import DEFAULT, CompareJob, Options
    from sparseattn.evaluation.cost import LENGTHS

    set_threads(options.threads)
    wanted = Options(
        attention=options.attention or DEFAULT,
        seeds=options.seeds,
        lengths=LENGTHS if options.lengths is None else options.lengths,
        budgets=options.budgets,
        max_kl=options.max_kl,
        time_budget=options.time_budget,
        **model_options(options),
    )
    job = CompareJob(options.model, options.text, wanted)
    try:
        with job:
            job.run()
    except KeyboardInterrupt:
        try:
            print_result(job.result(), options.json)
        except BrokenPipeError:
            silence_stdout()
        again = f"; run the same command again to go on in {options.save}" if options.save else ""
        return interrupted(f"interrupted: the rows above are finished{again}")
    result = job.result()
    print_result(result, options.json)
    if options.save and not options.json:
        say_saved(options.save)
    return 0


def run_eval(options: argparse.Namespace) -> int:
    """Print the perplexity of one spec."""
    from sparseattn.evaluation.perplexity import perplexity

    set_threads(options.threads)
    result = perplexity(options.model, options.text, options.attention, **model_options(options))
    print_result(result, options.json)
    return 0


def run_generate(options: argparse.Namespace) -> int:
    """Print a continuation while it is decoded."""
    from sparseattn.evaluation.job import load_model, output_folder

    set_threads(options.threads)
    output_folder(options.save)  # a wrong one is known before anything is written
    model: Any
    model, name = load_model(options.model, options.random_weights, options.tokenizer)
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "attention")
    settings = {name: getattr(options, name) for name in names}
    prompt = read_prompt(options.prompt)
    pieces = model.stream(prompt, **settings)
    text, complete = "", False
    make_printable()
    try:
        for piece in pieces:
            text += piece
            if not options.json:
                print(piece, end="", flush=True)
        complete = True
    except KeyboardInterrupt:
        pass  # what there is counts
    if not options.json:
        print()
    result = {"model": name, "prompt": prompt, "text": text, "complete": complete, **settings}
    print_report(result, None, options, "generate")
    return 0 if complete else interrupted("interrupted: the text is not complete")


def run_info(options: argparse.Namespace) -> int:
    """Print what runs here and which variants there are."""
    from sparseattn.evaluation.trust import environment
    from sparseattn.variants import specs

    set_threads(options.threads)
    env = environment()
    known = specs()
    report = {**env, "variants": {s.name: s.summary for s in known}}
    lines = [f"{name:<12}{value}" for name, value in env.items() if not isinstance(value, dict)]
    lines += [f"{name:<12}{value or 'not installed'}" for name, value in env["packages"].items()]
    lines += ["", "variants (name, example, what it does):", *(f"  {s}" for s in known)]
    print_report(report, "\n".join(lines), options, "info")
    return 0


def run_version(options: argparse.Namespace) -> int:
    """Print the version."""
    print_report({"sparseattn": version()}, version(), options, "version")
    return 0


def model_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that verbs with a model share."""
    names = ("tokens", "context", "stride", "seed", "random_weights", "tokenizer", "save")
    return {name: getattr(options, name) for name in names}


def print_result(result: Any, as_json: bool) -> None:
    """Print a result, whatever the terminal's encoding can show."""
    make_printable()
    print(result.to_json() if as_json else result, end="" if as_json else "\n")


def read_prompt(prompt: str) -> str:
    """Return the prompt, or standard input where that is asked for."""
    if prompt != "-":
        return prompt
    from sparseattn.errors import ArgumentError

    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ArgumentError(
            f"the prompt on standard input is not UTF-8 at byte {error.start}: convert it"
        ) from None


def make_printable() -> None:
    """Let standard output replace what the terminal's encoding cannot show."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def print_report(
    report: dict[str, Any], text: str | None, options: argparse.Namespace, name: str
) -> None:
    """Print a small report, and save it where asked; no text: only where JSON is asked for."""
    content = json.dumps(report, indent=1)
    if options.save is not None:
        from sparseattn.evaluation.job import output_folder
        from sparseattn.evaluation.results import save_file

        folder = output_folder(options.save)
        if folder is not None:
            save_file(folder, f"{name}.json", content)
    if options.json or text is not None:
        print(content if options.json else text)


def say_saved(folder: str) -> None:
    """Say what was written, and which extra would draw the plots."""
    from sparseattn import plots

    print(f"saved  {os.path.join(folder, 'compare.csv')}, compare.json", end="")
    if plots.available():
        print(", compare.svg, compare-time.svg")
    else:
        print("; for the plots: pip install 'sparseattn[plot]', then run the same command again")


def set_threads(threads: int | None) -> None:
    """Set the number of threads, if one was given."""
    if threads is not None:
        from sparseattn import set_num_threads

        set_num_threads(threads)


def version() -> str:
    """Return the version."""
    from sparseattn import __version__

    return str(__version__)


# ---- ends --------------------------------------------------------------------------------------


def interrupted(message: str) -> int:
    """Say so and return the code of an interrupt."""
    print(f"sparseattn: {message}", file=sys.stderr)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence_stdout()
    return INTERRUPTED


def wrong_input(error: Exception) -> int:
    """Turn an error that a user can mend into one sentence; others keep their traceback."""
    from sparseattn.errors import InternalError, SparseAttnError

    if isinstance(error, SparseAttnError) and not isinstance(error, InternalError):
        sentence = " ".join(str(error).split())
        print(f"sparseattn: {sentence}", file=sys.stderr)
        return WRONG_INPUT
    raise error


def silence_stdout() -> None:
    """Whoever read our output has gone: keep Python from complaining when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def numbers(text: str) -> tuple[float, ...]:
    """Read numbers separated by commas."""
    try:
        return tuple(float(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0.5,0.25") from None


def integers(text: str) -> tuple[int, ...]:
    """Read integers separated by commas."""
    try:
        return tuple(int(part) for part in text.split(",") if part)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 512,1024") from None


def count_or_all(text: str) -> int | None:
    """Read a number, or None for ``all``."""
    if text == "all":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor 'all'") from None
