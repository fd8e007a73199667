#!/usr/bin/env bash
# Two vLLM servers and a trainer as HF Jobs, which meet in one network group and share a bucket. See README.md.
#
#   NAMESPACE=you RUN=run1 deploy/jobs/launch.sh [--dry-run]
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${NAMESPACE:?your user or organisation on the Hub, which owns the bucket and pays for the jobs}"
RUN=${RUN:-run1}                         # name of the run and of the network group
MODEL=${MODEL:-Qwen/Qwen3-0.6B}
SERVER_FLAVOR=${SERVER_FLAVOR:-l4x1}
TRAINER_FLAVOR=${TRAINER_FLAVOR:-l40sx1}
HOURS=${HOURS:-2}                        # a job is ended after this time
IMAGE=${IMAGE:-vllm/vllm-openai:v0.32.0} # has torch; the trainer runs in it too
BUCKET=hf://buckets/$NAMESPACE/rl/$RUN

job() { # job NAME FLAVOR SCRIPT: prints the id of the job
    hf jobs run $how --namespace "$NAMESPACE" --name "$RUN-$1" --flavor "$2" --timeout "${HOURS}h" \
        --network-group "$RUN" --network-alias "$1" --secrets HF_TOKEN --secrets VLLM_API_KEY \
        --env "HUBSYNC_BUCKET=$BUCKET" --env "MODEL=$MODEL" --env VLLM_PLUGINS=hubsync \
        --volume ./dist:/dist --volume ./examples:/examples \
        "$IMAGE" bash -c "$3"
}

serve='pip install --quiet /dist/hubsync_rl-*.whl && exec vllm serve "$MODEL" --port 8000 --dtype bfloat16 --enable-scale-out \
    --logprobs-mode processed_logprobs --worker-extension-cls vllm_plugin.DeltaWorkerExtension'
train='pip install --quiet "$(echo /dist/hubsync_rl-*.whl)[trl]" math-verify trackio && exec python3 /examples/four_servers/train.py \
    --model_name_or_path "$MODEL" --dataset_name trl-lib/DeepMath-103K --bucket "$HUBSYNC_BUCKET" \
    --servers "http://${HF_NETWORK_GROUP_PREFIX}server-a:8000" "http://${HF_NETWORK_GROUP_PREFIX}server-b:8000" \
    --vllm_server_base_url "http://${HF_NETWORK_GROUP_PREFIX}server-a:8000" --vllm_server_timeout 1800 \
    --output_dir /tmp/out --learning_rate 1e-6 --max_steps 100 --max_completion_length 1024 \
    --per_device_train_batch_size 8 --num_generations 8 --report_to none'

if [ "${1:-}" = --dry-run ]; then
    how=--dry-run
    job server-a "$SERVER_FLAVOR" "$serve" && job server-b "$SERVER_FLAVOR" "$serve" && job trainer "$TRAINER_FLAVOR" "$train"
    exit
fi
how="--detach --quiet"
pip wheel . --no-deps --wheel-dir dist
servers="$(job server-a "$SERVER_FLAVOR" "$serve") $(job server-b "$SERVER_FLAVOR" "$serve")"
trainer=$(job trainer "$TRAINER_FLAVOR" "$train")
echo "trainer $trainer, servers $servers. When the trainer has ended, so do the servers:"
hf jobs wait --namespace "$NAMESPACE" "$trainer" || true
for server in $servers; do hf jobs cancel --namespace "$NAMESPACE" "$server"; done
