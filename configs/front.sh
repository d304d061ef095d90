#!/usr/bin/env bash
# The front of toxicity against perplexity, with nothing chosen on what is reported: the data has three parts. Every cell
# of a grid is fitted on the first and measured on the second; of each method, with and without a gate, the cell with the
# fewest toxic continuations at no more than 0.5 further perplexity is chosen, and measured on the third. The best cells
# are measured on further prompts of the second part before, because a few prompts do not tell strong maps apart.
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
# the environment: MODEL (instead of the grid's), BUDGET (0.5), CONTENDERS (6 cells that are measured again), SAMPLES (5
# continuations a prompt), JUDGES ("profanity-check tox-block": the first one chooses), PARTS ("--choosing 120 --again 300
# --reported 150": how many openings of comments choose, choose among the contenders, and are reported).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
texts=$(realpath "$4") run=$5
read -ra judges <<<"${JUDGES:-profanity-check tox-block}"
mkdir -p "$run"
python "$here/front.py" start "$1" "$2" "$3" "$4" "$run" ${6:+--prompts "$6"} ${MODEL:+--model "$MODEL"} \
    --judges "${judges[@]}" ${PARTS:-} >"$run/started.txt"
cd "$run"
mapfile -t started <started.txt
how=(--model "${started[0]}" ${started[1]:+--dtype "${started[1]}"})
aura-dist collect --config control.yaml
aura-dist sweep --config sweep.yaml

mkdir -p again results
measure() { # NAME PROMPTS [flags]: once, with these flags
    local flags=(--toxicity-prompts "$2" --num-samples "${SAMPLES:-5}" --scorer "${judges[0]}" "${@:3}")
    if [[ -f $1.json ]]; then
        [[ ${flags[*]} == "$(cat "$1.flags")" ]] && return
        echo "error: $run/$1.json: expected it with ${flags[*]}, got it with $(cat "$1.flags");" \
            "give another RUN_DIR, and report on other texts, because what is reported must not be chosen" >&2
        exit 2
    fi
    echo "${flags[*]}" >"$1.flags"
    aura-dist evaluate "${how[@]}" "${flags[@]}" $effects --out "$1.json"
}
choose() { python "$here/front.py" choose sweep/table.csv --budget "${BUDGET:-0.5}" "$@"; }
effects=
choose --contenders "${CONTENDERS:-6}" >contenders.tsv
while IFS=$'\t' read -r _ intervention strength; do
    measure "again/${intervention##*/}-$strength" parts/again.jsonl --intervention "$intervention" --strength "$strength"
done <contenders.tsv
choose --measured again >chosen.tsv

report() { # NAME [flags]
    measure "results/$1" parts/report.jsonl --perplexity-texts "$texts" \
        ${judges[1]:+--more-scorers "${judges[@]:1}"} "${@:2}"
    found+=("results/$1.json")
}
found=()
report none
effects=--side-effects # of the first, which is the best of all: they take as long as the rest
while IFS=$'\t' read -r name intervention strength; do
    report "$name" --intervention "$intervention" --strength "$strength" --baseline results/none.json
    effects=
done <chosen.tsv
python -m aura_dist.evaluation.compare "${found[@]}" | tee front.md
aura-dist report . sweep --out report.html
