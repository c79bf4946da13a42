#!/usr/bin/env bash
# Prints the jobs of the table of pretrain_vae_moa.py, one per line, the most wanted first.
# All of them:      bash benchmark/pretrain_vae_moa.sh | OMP_NUM_THREADS=1 xargs -P 2 -d '\n' -n 1 sh -c
# Some of them:     bash benchmark/pretrain_vae_moa.sh | grep history | OMP_NUM_THREADS=1 xargs ...
# Elsewhere:        RUNS=/scratch/runs bash benchmark/pretrain_vae_moa.sh
# Running the list again finishes what is missing; `python benchmark/moa.py table` makes the table,
# and `python benchmark/moa.py unseen runs/pretrain_vae_moa-moa-z{,-history}__4p5b8x8__*` that for players of a third
# script.
runs=${RUNS:-runs}

job() { # variant, seed, arguments
    echo "python pretrain_vae_moa.py --runs-dir $runs --run-name pretrain_vae_moa-$1__4p5b8x8__$2 --resume --seed $2 ${*:3}"
}

for seed in 1 2 3; do
    job moa-z $seed --objective moa
    job moa-z-history $seed --objective moa --context history
    job moa-z-history-600k $seed --objective moa --context history --rows 600000
    job moa-z-4frames $seed --objective moa --context 4
    job reconstruction $seed --objective reconstruction
    job moa-state $seed --objective moa --head-input state
    job moa-state+z $seed --objective moa --head-input state+z
    if [ $seed = 1 ]; then # the experiments
        job both-z $seed --objective both
        job moa-z-not-augmented $seed --objective moa --no-augment
    fi
done
