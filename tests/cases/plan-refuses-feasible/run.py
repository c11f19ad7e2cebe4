from megatron_rl.data.schedule import SampleSize, ScheduleError, plan

for tokens, dp, budget in (
    ([200, 60, 60, 60], 2, 100),
    ([30000] + [5000] * 7, 2, 8192),
    ([9000, 20000, 4500, 4500, 4500, 4500], 2, 8192),
):
    sizes = [SampleSize(i, i, n, n - 10) for i, n in enumerate(tokens)]
    try:
        parts = plan(sizes, mini_batches=1, dp=dp, max_tokens=budget).steps[0].micro_batches
        print(tokens, "->", [[[tokens[i] for i in p] for p in replica] for replica in parts])
    except ScheduleError as error:
        print(tokens, "-> ScheduleError:", error)
