#!/usr/bin/env bash
# Sequential fitting: each layer's map is estimated on responses under the maps of all layers before it, so that no layer
# corrects what an earlier one has corrected already.
#
#   bash configs/sequential.sh CONFIG.yaml RUN_DIR NUM_LAYERS PATTERN...
#   bash configs/sequential.sh configs/sequential.yaml run 18 'model.layers.{}.post_attention_layernorm' \
#                                                             'model.layers.{}.post_feedforward_layernorm'
#
# {} in a pattern becomes each layer. The result is RUN_DIR/interventions/layer-LAST. One pass of the model makes it, at
# the cost of about two forwards; a result that is there is left as it is.
set -euo pipefail
config=$1 run=$2 num_layers=$3
shift 3
out="$run/interventions/layer-$((num_layers - 1))"
modules=()
for ((layer = 0; layer < num_layers; layer++)); do
    modules+=("${@//\{\}/$layer}")
done
if [[ ! -f "$out/intervention.json" ]]; then
    aura-dist fit --sequential --config "$config" --modules "${modules[@]}" --out "$out"
fi
echo "wrote $out"
