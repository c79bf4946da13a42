#!/usr/bin/env bash
# Prints the jobs of the table in docs/world_model_test.md, one per line. From 1 to 6 each row changes one thing in the
# one before, except that only 3 has the contrastive term; 0 is 1 on a smaller board, 7 and 8 are 6 and 2 with a moving
# stag.
# The `board` jobs train on 8x8 and test on larger boards with more hares and blocks, next to models that were trained
# there; a test needs the model of its training job, so run the list again if a test came too early.
# All of them:      bash benchmark/world_model_test.sh | OMP_NUM_THREADS=1 xargs -P 2 -d '\n' -n 1 sh -c
# Elsewhere:        RUNS=/scratch/runs bash benchmark/world_model_test.sh
# Running the list again finishes what is missing. Run names are world_model_test-<row>__<seed>.
runs=${RUNS:-runs}

job() { # row, seed, arguments
    echo "python world_model_test.py --runs-dir $runs --run-name world_model_test-$1__$2 --resume --seed $2 ${*:3}"
}

for seed in 1 2 3; do
    job 6-entity $seed
    job 1-mse-planes $seed --model mse --action-input planes
    job 2-mse-painted $seed --model mse
    job 3-mse-painted-contrastive $seed --model mse --contrastive-coef 0.1
    job 4-cell $seed --model cell
    job 5-entity-no-mask $seed --no-mask
    job 0-mse-planes-4x4 $seed --model mse --action-input planes --env 4p5b4x4
    job 7-entity-moving-stag $seed --stag-moves
    job 8-mse-painted-moving-stag $seed --model mse --stag-moves
done

for seed in 1 2 3; do
    job board8 $seed --n-blocks 2
    job board10 $seed --size 10 --n-hares 6 --n-blocks 4
    job board12 $seed --size 12 --n-hares 8 --n-blocks 6
done
for seed in 1 2 3; do
    model=$runs/world_model_test-board8__$seed/model.pt
    job board8-on-10 $seed --size 10 --n-hares 6 --n-blocks 4 --load "$model"
    job board8-on-12 $seed --size 12 --n-hares 8 --n-blocks 6 --load "$model"
done
