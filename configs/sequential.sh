#!/usr/bin/env bash
# Sequential fitting: each layer's map is estimated on responses collected under the maps of all layers before it, so
# that no layer corrects what an earlier one has corrected already.
#
#   bash configs/sequential.sh CONFIG.yaml RUN_DIR NUM_LAYERS PATTERN...
#   bash configs/sequential.sh configs/sequential.yaml run 18 'model.layers.{}.post_attention_layernorm' \
#                                                             'model.layers.{}.post_feedforward_layernorm'
#
# {} in a pattern becomes the layer. The result is RUN_DIR/interventions/layer-LAST. Finished steps are skipped, so that
# the same command continues after an interruption. A layer's forward ends at that layer: all steps
# together cost about half as many layer forwards as NUM_LAYERS whole collections.
set -euo pipefail
config=$1 run=$2 num_layers=$3
shift 3
mkdir -p "$run/stores" "$run/interventions"
before=()
onto=()
for ((layer = 0; layer < num_layers; layer++)); do
    store="$run/stores/layer-$layer.zarr"
    out="$run/interventions/layer-$layer"
    if [[ ! -f "$out/intervention.json" ]]; then
        aura-dist collect --config "$config" --modules "${@//\{\}/$layer}" "${before[@]}" --store "$store"
        aura-dist score --config "$config" --store "$store"
        aura-dist fit --config "$config" --store "$store" "${onto[@]}" --out "$out"
    fi
    before=(--intervention "$out")
    onto=(--onto "$out")
done
echo "wrote $run/interventions/layer-$((num_layers - 1))"
