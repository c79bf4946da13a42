#!/usr/bin/env bash
# Prints the jobs of the study in docs/plas_pixels.md, one per line, the most wanted first.
# All of them:      bash benchmark/plas_pixels.sh | OMP_NUM_THREADS=1 xargs -P 2 -d '\n' -n 1 sh -c
# Elsewhere:        RUNS=/scratch/runs bash benchmark/plas_pixels.sh
# Running the list again finishes what is missing. Run names are plas_pixels-<signal>-<dataset>__<environment>__<seed>.
# The last jobs need the files that the first two write: started before those have ended, they fail with one line, and
# the list has to be run again.
runs=${RUNS:-runs}

job() { # signal, dataset, environment, seed, arguments
    echo "python plas_pixels.py --runs-dir $runs --run-name plas_pixels-$1-$2__${3//\//-}__$4 --resume" \
        "--env $3 --encoder-signal $1 --seed $4 ${*:5}"
}

# The data of cartpole-swingup, from an agent that sees states: 15,000 transitions; and 100,000, as in V-D4RL, from an
# agent that takes about as many gradient steps.
source=$runs/plas_pixels_data__cartpole-swingup
collect="python benchmark/plas_data.py --env cartpole-swingup --action-repeat 4"
echo "$collect --folder $source"
echo "$collect --steps 100000 --update-every 7 --folder $source-100k"

for seed in 1 2 3 4 5; do
    for data in medium expert random; do
        for signal in both critic vae none separate reconstruction; do
            job $signal $data DotHazard-v0 $seed --dataset $data --eval-episodes 100
        done
    done
done

# Four times the data, and four times the training: do the critics alone catch up, does the VAE still memorize noise?
for seed in 1 2 3; do
    for signal in critic separate vae both; do
        job $signal medium-60k DotHazard-v0 $seed --dataset medium --collect-steps 60000 --eval-episodes 100
    done
    for signal in critic both; do
        job $signal medium-long DotHazard-v0 $seed --dataset medium --total-timesteps 40000 --eval-episodes 100
    done
done

# Each of 15,000 steps. Mixed: all that this agent did while it learnt. Medium: its final policy. A gamma of 0.98 for
# four environment steps is V-D4RL's 0.99 for two.
for seed in 1 2; do
    for data in medium mixed; do
        for signal in both critic vae; do
            job $signal $data dm_control/cartpole-swingup-v0 $seed --dataset "$source/$data.npz" \
                --action-repeat 4 --gamma 0.98 --image-size 64 --bf16 --eval-episodes 10
        done
    done
done

# Are 15,000 transitions too few, and does LayerNorm help with more? 100,000 transitions, 25,000 gradient steps.
for seed in 1 2; do
    for norm in "" --layer-norm; do
        for data in medium mixed; do
            for signal in both critic vae; do
                job $signal "$data-100k${norm/--/-}" dm_control/cartpole-swingup-v0 $seed \
                    --dataset "$source-100k/$data.npz" --total-timesteps 25000 --action-repeat 4 --gamma 0.98 \
                    --image-size 64 --bf16 --eval-episodes 10 $norm
            done
        done
    done
done

# Are pictures that are not shifted cloned better? Compare with the same step of medium-100k.
job both medium-100k-no-shift dm_control/cartpole-swingup-v0 1 --dataset "$source-100k/medium.npz" \
    --total-timesteps 10000 --action-repeat 4 --gamma 0.98 --image-size 64 --bf16 --eval-episodes 10 --random-shift 0
