#!/usr/bin/env bash
# vLLM, and the follower that keeps it at the run's version. Ends when either ends, with its exit code.
set -u
: "${MODEL:?set it to the checkpoint that the trainer started from}"
: "${HUBSYNC_BUCKET:?set it to the address of the run, such as hf://buckets/you/rl/run1}"
port=${PORT:-8000}

# shellcheck disable=SC2086 # VLLM_ARGUMENTS are several words
VLLM_PLUGINS=hubsync vllm serve "$MODEL" --host 0.0.0.0 --port "$port" --dtype bfloat16 \
    --logprobs-mode processed_logprobs --worker-extension-cls vllm_plugin.DeltaWorkerExtension ${VLLM_ARGUMENTS:-} &
server=$!
hubsync follow "$HUBSYNC_BUCKET" --server "http://127.0.0.1:$port" &
follower=$!

trap 'kill "$server" "$follower" 2>/dev/null' TERM INT
wait -n "$server" "$follower"
code=$?
kill "$server" "$follower" 2>/dev/null
wait
exit "$code"
