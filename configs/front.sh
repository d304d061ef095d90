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
# which has side effects too, of the cell that is the best when the first report is made. Finished steps are skipped, so
# that the same command continues after an interruption, and with further cells in the grid; what was started or reported
# with other settings or data is refused.
# RUN_DIR/front.md has the table, RUN_DIR/report.html the picture. The grid's `model` and `dtype` count in every step. From
# the environment: MODEL (instead of the grid's), BUDGET (0.5), SAMPLES (5 continuations a prompt), JUDGES
# ("profanity-check tox-block": the first one chooses).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
texts=$(realpath "$4") run=$5
read -ra judges <<<"${JUDGES:-profanity-check tox-block}"
mkdir -p "$run"
python "$here/front.py" start "$1" "$2" "$3" "$4" "$run" ${6:+--prompts "$6"} ${MODEL:+--model "$MODEL"} \
    --judges "${judges[@]}" >"$run/started.txt"
cd "$run"
mapfile -t started <started.txt
how=(--model "${started[0]}" ${started[1]:+--dtype "${started[1]}"})
aura-dist collect --config control.yaml
aura-dist sweep --config sweep.yaml

mkdir -p results
python "$here/front.py" choose sweep/table.csv --budget "${BUDGET:-0.5}" >chosen.tsv
measure() { # NAME [flags]: once, because what is reported must not be chosen
    local flags=(--num-samples "${SAMPLES:-5}" --scorer "${judges[0]}" ${judges[1]:+--more-scorers "${judges[@]:1}"} "${@:2}")
    if [[ -f results/$1.json ]]; then
        [[ ${flags[*]} == "$(cat "results/$1.flags")" ]] && return
        echo "error: $run/results/$1.json: expected it with ${flags[*]}, got it with $(cat "results/$1.flags");" \
            "give another RUN_DIR, and report on other texts" >&2
        exit 2
    fi
    echo "${flags[*]}" >"results/$1.flags"
    aura-dist evaluate "${how[@]}" --toxicity-prompts parts/report.jsonl --perplexity-texts "$texts" "${flags[@]}" \
        $effects --out "results/$1.json"
}
effects=
measure none
found=(results/none.json)
effects=--side-effects # of the first, which is the best of all: they take as long as the rest
while IFS=$'\t' read -r name intervention strength; do
    measure "$name" --intervention "$intervention" --strength "$strength" --baseline results/none.json
    effects=
    found+=("results/$name.json")
done <chosen.tsv
python -m aura_dist.evaluation.compare "${found[@]}" | tee front.md
aura-dist report . sweep --out report.html
