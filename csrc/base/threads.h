/* threads.h - the pool. One for the process, created at first use, rebuilt after fork. */
#ifndef SA_THREADS_H
#define SA_THREADS_H

#include "base/ctx.h"

#define SA_MAX_THREADS 64

/* One task. worker in [0, sa_workers_max()) names the scratch slot; a failed task ends the call. */
typedef sa_status (*sa_task_fn)(sa_ctx *ctx, void *arg, int64_t task, int worker);

/* Runs fn for every task in [0, n_tasks), on up to sa_num_threads() threads, the caller (worker 0)
 * among them. Tasks are cut by shape, never by thread count, and each output element has one
 * writer, so results do not depend on threads. A second caller at the same time, or a call from
 * inside a task, runs inline. Tasks are handed out in order from an atomic counter. Returns the
 * first failure, or SA_ESTOP, after every thread has left fn. */
sa_status sa_parallel(sa_ctx *ctx, int64_t n_tasks, sa_task_fn fn, void *arg);

/* sa_stopped for tasks longer than some 20 ms: lets worker 0 poll as well. */
bool sa_stop_asked(sa_ctx *ctx, int worker);

/* Default: SPARSEATTN_NUM_THREADS, else OMP_NUM_THREADS, else the CPUs that affinity and cgroup
 * quota allow; read at first use. */
int sa_num_threads(void);
void sa_num_threads_set(int count); /* 1 .. SA_MAX_THREADS; may exceed the number of CPUs */
int sa_workers_max(void);           /* scratch slots: SA_MAX_THREADS */

/* What the default rests on (num_threads.c). The quota is INT_MAX where there is none; groups and
 * mount are what to read instead of /proc/self/cgroup and /sys/fs/cgroup when not NULL. */
int sa_cpus_affine(void);
int sa_cpus_quota(const char *groups, const char *mount);

#endif
