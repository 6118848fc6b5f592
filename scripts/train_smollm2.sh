#!/usr/bin/env bash
# Trains the heads in scripts/smollm2_heads again: distil, train, calibrate. Each step continues where it was stopped.
# It takes about three hours on two CPU cores with bf16 instructions. This command tries it out in a few minutes:
#   WORK=/tmp/try HEADS=/tmp/try/heads DTYPE=fp32 PROMPTS=12 MORE=12 BATCH_SIZE=12 HELDOUT=0.3 MORE_HELDOUT=0.3 \
#     MAX_NEW_TOKENS=24 EPOCHS=1 DRAFT_VOCAB=512 scripts/train_smollm2.sh
set -euo pipefail
. "$(dirname "$0")/setup.sh"

work=${WORK:-.cache/train}                # data, hidden states, checkpoints
heads=${HEADS:-scripts/smollm2_heads}     # replaced by the new heads
prompts=${PROMPTS:-2600}                  # templated prompts, and the same number written by the model
more=${MORE:-6000}                        # prompts that the model writes at a higher temperature
batch_size=${BATCH_SIZE:-128}
heldout=${HELDOUT:-0.05}
more_heldout=${MORE_HELDOUT:-0.04}
max_new_tokens=${MAX_NEW_TOKENS:-256}
epochs=${EPOCHS:-3}
draft_vocab=${DRAFT_VOCAB:-6144}
dtype=${DTYPE:-bf16}                      # fp32 is faster on a CPU without bf16 instructions

# glibc keeps freed memory in the process. That saves a fifth of the time on a CPU.
export MALLOC_MMAP_THRESHOLD_=100000000000 MALLOC_TRIM_THRESHOLD_=100000000000
model=$(scripts/smollm2.sh)
mkdir -p "$work" "$heads"
python scripts/seed_prompts.py "$prompts" > "$work/prompts.txt"
distill() {
  medusa-export distill "$model" --max-new-tokens "$max_new_tokens" --temperature 0 --dtype "$dtype" \
    --batch-size "$batch_size" "$@"
}
bf16=--no-bf16
[ "$dtype" = bf16 ] && bf16=--bf16
distill --output "$work/templates" --prompts "$work/prompts.txt" --heldout "$heldout"
distill --output "$work/magpie" --magpie "$prompts" --prompt-temperature 0.8 --heldout "$heldout"
distill --output "$work/more" --magpie "$more" --prompt-temperature 0.9 --seed 11 --heldout "$more_heldout"
medusa-export train "$model" --data "$work/templates" --data "$work/magpie" --data "$work/more" \
  --output "$work/trained" --dtype "$dtype" $bf16 --max-length 512 \
  --num-heads 4 --num-layers 2 --draft-vocab "$draft_vocab" --epochs "$epochs" --soft 0.5
medusa-export calibrate "$model" --heads "$work/trained" --data "$work/more" --output "$work/calibration.json" \
  --plot "$heads/calibration.png"
for file in medusa_lm_head.safetensors config.json training.json training.png; do
  cp "$work/trained/$file" "$heads/"
done
cp "$work/calibration.json" "$heads/"
sed -i 's|"base_model_name_or_path": .*|"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"|' "$heads/config.json"
