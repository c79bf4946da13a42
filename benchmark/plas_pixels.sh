#!/usr/bin/env bash
# Prints the jobs of the study in docs/plas_pixels.md, one a line, the most wanted first.
# All of them:      bash benchmark/plas_pixels.sh | OMP_NUM_THREADS=1 xargs -P 2 -d '\n' -n 1 sh -c
# Elsewhere:        RUNS=/scratch/runs bash benchmark/plas_pixels.sh
# Running the list again finishes what is missing. Run names are plas_pixels-<signal>-<dataset>__<environment>__<seed>.
# The last jobs need what the first one leaves: begun before it has ended, they fail with a line, and need a second run
# of the list.
runs=${RUNS:-runs}

job() { # signal, dataset, environment, seed, arguments
    echo "python plas_pixels.py --runs-dir $runs --run-name plas_pixels-$1-$2__${3//\//-}__$4 --resume" \
        "--env $3 --encoder-signal $1 --seed $4 ${*:5}"
}

# The data for finger-spin: an agent that learns for 15,000 agent steps, one transition each.
source=plas_pixels_data__finger-spin__1
echo "python sac_ae_pixels.py --runs-dir $runs --run-name $source --resume --env finger-spin --seed 1 --image-size 64" \
    "--total-timesteps 30000 --bf16 --save-replay"

for seed in 1 2 3 4 5; do
    for data in medium expert random; do
        for signal in both critic vae none separate reconstruction; do
            job $signal $data DotHazard-v0 $seed --dataset $data --eval-episodes 100
        done
    done
done

# Four times the data, and four times the training: do the critics alone catch up, does the VAE still learn noise by heart?
for seed in 1 2 3; do
    for signal in critic separate vae both; do
        job $signal medium-60k DotHazard-v0 $seed --dataset medium --collect-steps 60000 --eval-episodes 100
    done
    for signal in critic both; do
        job $signal medium-long DotHazard-v0 $seed --dataset medium --total-timesteps 40000 --eval-episodes 100
    done
done

# Medium: 15,000 steps of the agent's last policy, collected by the first of these jobs. Mixed: all that it has seen.
for seed in 1 2; do
    for signal in both critic vae; do
        job $signal medium dm_control/finger-spin-v0 $seed --dataset "$runs/$source/medium.npz" \
            --collect "$runs/$source/model.pt" --image-size 64 --bf16 --eval-episodes 10
        job $signal mixed dm_control/finger-spin-v0 $seed --dataset "$runs/$source/replay.npz" \
            --image-size 64 --bf16 --eval-episodes 10
    done
done
