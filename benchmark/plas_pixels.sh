#!/usr/bin/env bash
# Prints the jobs of the study in docs/plas_pixels.md, one a line, the most wanted first.
# All of them:      bash benchmark/plas_pixels.sh | xargs -P 2 -d '\n' -n 1 sh -c
# Elsewhere:        RUNS=/scratch/runs bash benchmark/plas_pixels.sh
# Running the list again finishes what is missing. Run names are plas_pixels-<signal>-<dataset>__<environment>__<seed>.
runs=${RUNS:-runs}

job() { # signal, dataset, environment, seed, arguments
    echo "python plas_pixels.py --runs-dir $runs --run-name plas_pixels-$1-$2__${3//\//-}__$4 --resume" \
        "--env $3 --encoder-signal $1 --seed $4 ${*:5}"
}

for seed in 1 2 3 4 5; do
    for data in medium expert random; do
        for signal in both critic vae none separate reconstruction; do
            job $signal $data DotHazard-v0 $seed --dataset $data --eval-episodes 100
        done
    done
done
