#!/usr/bin/env bash
# Prints the jobs of the results table and the ablations of hyar_td3.py, one a line, the most wanted first.
# All of them:      bash benchmark/hyar_td3.sh | xargs -P 2 -d '\n' -n 1 sh -c
# Some of them:     bash benchmark/hyar_td3.sh | grep Platform | xargs ...
# Elsewhere:        RUNS=/scratch/runs bash benchmark/hyar_td3.sh
# Running the list again finishes what is missing.
runs=${RUNS:-runs}

job() { # run name, arguments
    echo "python hyar_td3.py --runs-dir $runs --run-name $1 --resume ${*:2}"
}

table() { # environment, seeds
    for seed in $2; do job "hyar_td3__$1__$seed" --env "$1" --seed "$seed"; done
}

table Platform-v0 "1 2 3 4 5"
table Goal-v0 "1 2"
table HardGoal-v0 "1 2"
table Goal-v0 "3 4 5"
table HardGoal-v0 "3 4 5"

ablation() { # name, environment, seeds, arguments
    for seed in $3; do job "hyar_td3-$1__$2__$seed" --env "$2" --seed "$seed" "${@:4}"; done
}

for environment in Platform-v0 Goal-v0; do
    ablation rebuilt-adam $environment "1 2 3" --rebuild-vae-optimizer
    ablation one-hot $environment "1 2 3" --discrete-embedding one-hot
    ablation no-relabel $environment "1 2 3" --no-relabel
    ablation no-state-loss $environment "1 2 3" --state-weight 0
    ablation no-kl $environment "1 2 3" --kl-weight 0
done

table CatchPoint-v0 "1"
for n in 4 6 8 10; do table "HardMove$n-v0" "1"; done
