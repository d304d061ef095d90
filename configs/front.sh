#!/usr/bin/env bash
# The front of toxicity against perplexity, with nothing chosen on what is reported: the data has three parts. Every cell
# of a grid is fitted on the first and measured on the second; of each method, with and without a gate, the cell with the
# fewest toxic continuations at no more than 0.5 further perplexity is chosen, and measured on the third.
#
#   bash configs/front.sh GRID.yaml COMMENTS.csv NEUTRAL.csv TEXTS.csv RUN_DIR [PROMPTS.jsonl]
#   bash configs/front.sh configs/front-gemma-3-270m.yaml comments.csv neutral.csv texts.csv runs/front prompts.jsonl
#
# COMMENTS.csv has the columns text and toxic; NEUTRAL.csv has text, 400 or more passages that an intervention must leave
# as they are: 100 of them, or a quarter of fewer, measure perplexity while choosing, the others become the controls of the
# gates. TEXTS.csv, other such passages, and PROMPTS.jsonl, RealToxicityPrompts' records, are used once, for the report,
# which has the side effects of the best cell too. Finished steps are skipped, so that the same command continues after an
# interruption; another budget, dtype or data needs another RUN_DIR. RUN_DIR/front.md has the table, RUN_DIR/report.html
# the picture. The grid's `model` and `dtype` count in every step. From the environment: MODEL (instead of the grid's),
# BUDGET (0.5), SAMPLES (5 continuations a prompt), JUDGES ("profanity-check tox-block": the first one chooses).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
grid=$(realpath "$1") comments=$(realpath "$2") neutral=$(realpath "$3") texts=$(realpath "$4") run=$5
prompts=${6:+$(realpath "$6")}
read -ra judges <<<"${JUDGES:-profanity-check tox-block}"
model=${MODEL:-$(sed -n 's/^model: *//p' "$grid")} dtype=$(sed -n 's/^dtype: *//p' "$grid")
mkdir -p "$run"
cd "$run"

if [[ ! -f parts/done ]]; then
    python "$here/front.py" parts "$comments" "$neutral" parts ${prompts:+--beside "$prompts"}
    touch parts/done
fi
mapfile -t modules < <(python "$here/front.py" modules "$grid")
aura-dist collect --model "$model" ${dtype:+--dtype "$dtype"} --data parts/control.csv --unlabelled \
    --modules "${modules[@]}" --pooling mean --store control.zarr
{ echo "model: $model"; echo "out: sweep"; grep -v '^model:' "$grid"; } >sweep.yaml
aura-dist sweep --config sweep.yaml

mkdir -p results
python "$here/front.py" choose sweep/table.csv --budget "${BUDGET:-0.5}" >chosen.tsv
measure() { # NAME [flags]
    [[ -f results/$1.json ]] && return
    aura-dist evaluate --model "$model" ${dtype:+--dtype "$dtype"} --toxicity-prompts parts/report.jsonl \
        --num-samples "${SAMPLES:-5}" --scorer "${judges[0]}" ${judges[1]:+--more-scorers "${judges[@]:1}"} \
        --perplexity-texts "$texts" "${@:2}" --out "results/$1.json"
}
measure none
found=(results/none.json)
effects=--side-effects # of the first, which is the best of all: they take as long as the rest
while IFS=$'\t' read -r name intervention strength; do
    measure "$name" --intervention "$intervention" --strength "$strength" --baseline results/none.json $effects
    effects=
    found+=("results/$name.json")
done <chosen.tsv
python -m aura_dist.evaluation.compare "${found[@]}" | tee front.md
aura-dist report . sweep --out report.html
