#!/bin/sh
# Environments of the peers that clash with ours: FOLDER/llama.cpp and FOLDER/pyreft.
#
#     sh benchmarks/runtime/environments.sh FOLDER
#
# llama-cpp-python is compiled here for this machine's own instructions, which takes minutes and needs a C++ compiler.
set -eu
folder=${1:?give a folder for the environments}
mkdir -p "$folder"

python3 -m venv "$folder/llama.cpp"
"$folder/llama.cpp/bin/pip" install --quiet llama-cpp-python

python3 -m venv "$folder/pyreft"
"$folder/pyreft/bin/pip" install --quiet torch==2.13.0 transformers==4.45.1 accelerate datasets evaluate scikit-learn
"$folder/pyreft/bin/pip" install --quiet --no-deps pyreft==0.1.0 pyvene==0.1.8
