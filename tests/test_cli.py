"""The command line, as child processes: what is printed, exit codes, interrupts."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_models import write_gpt2, write_llama

import sparseattn as sa
from sparseattn.cli import main

VERBS = ("compare", "eval", "info", "version")
COMMAND = [sys.executable, "-m", "sparseattn"]
