#!/usr/bin/env bash
# Prints the jobs of the results table and the ablations of sac_ae_pixels.py, one per line, the most wanted first.
# All of them:      bash benchmark/sac_ae_pixels.sh | OMP_NUM_THREADS=1 xargs -P 2 -d '\n' -n 1 sh -c
# Some of them:     bash benchmark/sac_ae_pixels.sh | grep Pendulum | OMP_NUM_THREADS=1 xargs ...
# Elsewhere:        RUNS=/scratch/runs bash benchmark/sac_ae_pixels.sh
# Running the list again finishes what is missing.
runs=${RUNS:-runs}

listed=" "

job() { # run name, arguments; each job is listed once, where it is most wanted
    [[ $listed == *" $1 "* ]] && return
    listed+="$1 "
    echo "python sac_ae_pixels.py --runs-dir $runs --run-name $1 --resume ${*:2}"
}

table() { # environment, seeds
    for seed in $2; do job "sac_ae_pixels__$1__$seed" --env "$1" --seed "$seed" --total-timesteps 100000 --bf16; done
}

ablation() { # name, environment, seeds, arguments
    for seed in $3; do
        job "sac_ae_pixels-$1__$2__$seed" --env "$2" --seed "$seed" --total-timesteps 100000 --bf16 "${@:4}"
    done
}

# Random shifts in place of the autoencoder; the same with residual actions.
shifted() { # environment, seeds
    ablation shift-alone "$1" "$2" --random-shift 4 --no-reconstruction
    ablation residual "$1" "$2" --random-shift 4 --no-reconstruction --residual-action
}

# From pixels to a solved pendulum in minutes; in float32 and in bfloat16.
pendulum() { # name, arguments
    for seed in 1 2 3; do
        job "sac_ae_pixels$1__Pendulum-v1__$seed" --env Pendulum-v1 --seed $seed --image-size 24 --action-repeat 2 \
            --num-layers 2 --num-filters 16 --hidden-dim 256 --batch-size 64 --gamma 0.95 --total-timesteps 20000 \
            --eval-frequency 2000 "${@:2}"
    done
}

table cartpole-swingup 1
table ball_in_cup-catch 1
ablation no-reconstruction ball_in_cup-catch 1 --no-reconstruction
ablation random-shift cartpole-swingup 1 --random-shift 4
shifted cartpole-swingup "1 2 3"
shifted ball_in_cup-catch 1
ablation newcomer cartpole-swingup 1 --image-size 64 --random-shift 4 --no-reconstruction
shifted cheetah-run 1
shifted reacher-easy 1
ablation random-shift ball_in_cup-catch 1 --random-shift 4
pendulum ""
pendulum -bf16 --bf16
pendulum -residual-alone --residual-action
ablation no-reconstruction cartpole-swingup 1 --no-reconstruction
for environment in finger-spin walker-walk reacher-easy cheetah-run; do
    table $environment 1
    ablation no-reconstruction $environment 1 --no-reconstruction
    ablation random-shift $environment 1 --random-shift 4
    ablation shift-alone $environment 1 --random-shift 4 --no-reconstruction
done
for seed in 2 3 4 5; do
    for environment in cartpole-swingup ball_in_cup-catch finger-spin walker-walk reacher-easy cheetah-run; do
        table $environment $seed
        ablation no-reconstruction $environment $seed --no-reconstruction
        ablation random-shift $environment $seed --random-shift 4
        ablation shift-alone $environment $seed --random-shift 4 --no-reconstruction
    done
done
