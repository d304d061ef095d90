#!/usr/bin/env bash
# The results in README.md: the front of both models, and one table of the two. front.sh says what its steps, files and
# settings from the environment are, but for MODEL, which counts for nothing here.
#
#   bash configs/fronts.sh COMMENTS.csv NEUTRAL.csv TEXTS.csv RUN_DIR [PROMPTS.jsonl]
#
# RUN_DIR/table.md has the table, RUN_DIR/gemma-3-270m/report.html and its folder of pictures the picture.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
models=(gemma-3-270m smollm2-135m)
for model in "${models[@]}"; do
    env -u MODEL bash "$here/front.sh" "$here/front-$model.yaml" "$1" "$2" "$3" "$4/$model" ${5:+"$5"}
done
python "$here/front.py" table "${models[@]/#/$4/}" \
    --rows none aura mean-act linear-act pid-act lineas linear-act-gated mean-act-gated | tee "$4/table.md"
