/* select_body.h - selection for one real type; select.c sets REAL, KEY, KEY_MAX, LOWEST and NAME.
 *
 * Everything rests on the level of a row: the largest t that at least `count` scores reach. Scores
 * above it are taken, then scores equal to it, lower indices first, until there are enough.
 */

/* Reals ordered as integers (-0 next to 0). The map is its own inverse. */
static KEY
NAME(key_of)(REAL x)
{
    KEY bits;
    memcpy(&bits, &x, sizeof bits);
    return bits < 0 ? bits ^ KEY_MAX : bits;
}

static REAL
NAME(real_of)(KEY key)
{
    const KEY bits = key < 0 ? key ^ KEY_MAX : key;
    REAL x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* Bisection over the bits of t: at most one count a bit, and none once exactly `count` scores reach
 * t. At least `count` of value[0..n) must reach low. */
static REAL
NAME(level_of)(const sa_tile *tile, const REAL *value, int64_t n, int64_t count, REAL low)
{
    KEY reached = NAME(key_of)(low), missed = NAME(key_of)((REAL)INFINITY) + 1;
    for (;;) {
        const KEY middle = (reached >> 1) + (missed >> 1) + (reached & missed & 1);
        if (middle == reached) {
            return NAME(real_of)(reached);
        }
        const int64_t found = tile->count_ge(value, n, (double)NAME(real_of)(middle));
        if (found == count) {
            return NAME(real_of)(middle);
        }
        if (found > count) {
            reached = middle;
        } else {
            missed = middle;
        }
    }
}

/* Keeps, in place, those index[j] whose value[j] belongs to the `count` largest, value being n
 * scores that hold them all and index ascending. */
static void
NAME(keep_largest)(const sa_tile *tile, const REAL *value, int64_t n, int64_t count, int32_t *index,
                   REAL low)
{
    const REAL level = NAME(level_of)(tile, value, n, count, low);
    int64_t above = 0, kept = 0;
    for (int64_t j = 0; j < n; j++) {
        above += !(value[j] <= level);
    }
    int64_t equal = count - above; /* below 0: the level is +inf and too many NaNs lie above it */
    for (int64_t j = 0; j < n && kept < count; j++) {
        const bool take = !(value[j] <= level) || (value[j] == level && equal-- > 0);
        index[kept] = index[j];
        kept += take;
    }
}

/* A level that about the `rank` largest of the sample reach. The sample's places are irregular so
 * that no period of the scores can meet them all. */
static REAL
NAME(guess_level)(const sa_tile *tile, const REAL *sample, int64_t rank)
{
    if (tile->count_ge(sample, SAMPLES, (double)LOWEST) <= rank) {
        return LOWEST;
    }
    return NAME(level_of)(tile, sample, SAMPLES, rank, LOWEST);
}

static void
NAME(take_sample)(REAL *sample, const REAL *s, int64_t n)
{
    const uint64_t step = (uint64_t)n / SAMPLES;
    uint32_t noise = 1;
    for (uint64_t i = 0; i < SAMPLES; i++) {
        noise = noise * 1664525u + 1013904223u;
        sample[i] = s[i * step + (noise * step >> 32)];
    }
}

/* Candidates that reach a guessed level, at least `count` of them where so many exist; *low is that
 * level. A wrong guess costs another pass with a lower one; the last level is LOWEST. */
static int64_t
NAME(survivors)(const sa_tile *tile, const REAL *s, int64_t n, int64_t count, REAL *sample,
                int32_t *index, REAL *low)
{
    NAME(take_sample)(sample, s, n);
    const double share = (double)count * SAMPLES / (double)n;
    for (int64_t rank = (int64_t)(share + 3 * sqrt(share) + 2);; rank = 4 * rank) {
        *low = NAME(guess_level)(tile, sample, SA_MIN(rank, SAMPLES));
        const int64_t found = tile->compress_ge(s, n, (double)*low, index);
        if (found >= count || *low == LOWEST) {
            return found;
        }
        if (rank >= SAMPLES) {
            *low = LOWEST;
            return tile->compress_ge(s, n, (double)LOWEST, index);
        }
    }
}

int64_t
NAME(sa_select_largest)(const REAL *s, int64_t n, int64_t count, int32_t *index, void *scratch)
{
    const sa_tile *const tile = sa_tile_for(sizeof(REAL) == 8);
    REAL *const sample = scratch, *const gathered = sample + SAMPLES;
    int32_t *const among = (int32_t *)(gathered + n);
    count = SA_MIN(count, n);
    if (count <= 0) {
        return 0;
    }
    REAL low;
    int64_t found;
    if (n >= SAMPLE_FROM && count <= n / 4) {
        found = NAME(survivors)(tile, s, n, count, sample, among, &low);
    } else {
        const bool all = tile->count_ge(s, n, (double)LOWEST) <= count;
        low = all ? LOWEST : NAME(level_of)(tile, s, n, count, LOWEST);
        /* not to index, which has no room for what another thread may write to s meanwhile */
        found = tile->compress_ge(s, n, (double)low, among);
    }
    if (found > count) {
        for (int64_t j = 0; j < found; j++) {
            gathered[j] = s[among[j]];
        }
        NAME(keep_largest)(tile, gathered, found, count, among, low);
    }
    found = SA_MIN(count, found);
    memcpy(index, among, (size_t)found * sizeof *index);
    return found;
}
