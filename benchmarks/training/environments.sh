#!/bin/sh
# Environments of the peers, each with the transformers it was made for: FOLDER/pyreft and FOLDER/peft. The plots are
# drawn in the second.
#
#     sh benchmarks/training/environments.sh FOLDER
set -eu
folder=${1:?give a folder for the environments}
mkdir -p "$folder"

python3 -m venv "$folder/pyreft"
"$folder/pyreft/bin/pip" install --quiet torch==2.13.0 transformers==4.45.1 accelerate datasets evaluate matplotlib scikit-learn
"$folder/pyreft/bin/pip" install --quiet --no-deps pyreft==0.1.0 pyvene==0.1.8

python3 -m venv "$folder/peft"
"$folder/peft/bin/pip" install --quiet torch==2.13.0 peft==0.21.2 transformers matplotlib
