#!/usr/bin/env bash
# All methods side by side on one model: fit each on toxic and other comments, evaluate each on the same prompts and
# texts, and print one table (Markdown) with 95 % intervals.
#
#   bash configs/methods.sh MODEL COMMENTS.csv TEXTS.csv RUN_DIR [PROMPTS.jsonl]
#
# COMMENTS.csv has the columns text and toxic; TEXTS.csv has text; PROMPTS.jsonl are RealToxicityPrompts' records. The
# prompts are the first ten words of toxic comments that no fit saw, and PROMPTS. Finished steps are skipped, so that the
# same command continues after an interruption. About half an hour on 2 cores for a model of 270M parameters.
#
# From the environment: OPENINGS (150 held-out openings), SAMPLES (5 continuations a prompt), FITTED (500 comments of
# each class), SCORER (profanity-check), STRENGTHS ("1"; each other one is a line of its own), METHODS, EVALUATE (further
# flags of `aura-dist evaluate`).
set -euo pipefail
model=$1 comments=$2 texts=$3 run=$4 prompts=${5:-}
fitted=${FITTED:-500}
read -ra methods <<<"${METHODS:-damp det0 aura mean-act linear-act}"
read -ra strengths <<<"${STRENGTHS:-1}"
read -ra more <<<"${EVALUATE:-}"
here=$(dirname "$0")
mkdir -p "$run/interventions" "$run/results"

aura-dist collect --model "$model" --data "$comments" --concepts toxic --num-positive "$fitted" --num-negative "$fitted" \
    --match-length --modules mlp --pooling max mean --store "$run/store.zarr"
aura-dist score --store "$run/store.zarr"
for method in "${methods[@]}"; do
    if [[ ! -f "$run/interventions/$method/intervention.json" ]]; then
        top=()
        [[ $method == damp || $method == det0 ]] && top=(--top-k 500)
        aura-dist fit --store "$run/store.zarr" --concept toxic --method "$method" "${top[@]}" \
            --out "$run/interventions/$method"
    fi
done
python "$here/held_out_openings.py" "$comments" "$run/prompts.jsonl" --store "$run/store.zarr" --number "${OPENINGS:-150}" \
    ${prompts:+--beside "$prompts"}

results=()
measure() { # NAME [flags]
    local out="$run/results/$1.json"
    results+=("$out")
    [[ -f $out ]] && return
    aura-dist evaluate --model "$model" --toxicity-prompts "$run/prompts.jsonl" --num-samples "${SAMPLES:-5}" \
        --scorer "${SCORER:-profanity-check}" --perplexity-texts "$texts" "${more[@]}" "${@:2}" --out "$out"
}
measure none
for method in "${methods[@]}"; do
    for strength in "${strengths[@]}"; do
        name=$method
        [[ $strength == 1 ]] || name="$method-$strength"
        measure "$name" --intervention "$run/interventions/$method" --strength "$strength" \
            --baseline "$run/results/none.json"
    done
done
python -m aura_dist.evaluation.compare "${results[@]}"
