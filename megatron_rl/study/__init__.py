"""Studies: runs of declared arms and seeds, and a rule, fixed before the first run, that decides what they show.

A study's directory, whose place the study file gives, holds:

    study.yaml          the study file as it was at the start
    fingerprint.json    digests of all that the results depend on (fingerprint.py)
    plan.json           the runs in order: task, run, arm, seed, at, ranks, steps, needs, run_dir, log
    configs/RUN.yaml    each run's resolved configuration
    runs/RUN/           its run directory (lab/run.py)
    logs/RUN.log        what its ranks printed; logs/ranks.log: what they printed between runs
    results/RUN.json    its result (outcome.py), written whole or not at all
    results.jsonl       all results, in the order of the plan; rewritten whenever a run ends
    verdict.json        what the rule says of them (verdicts.py); rewritten with results.jsonl
    claims/RUN/         the process that does the run now (lab/owner.py)
    abandoned/RUN-K/    what a try left that broke off and could not be resumed

RUN is ARM-seed-SEED. Paths in these files are relative to the directory.
"""
