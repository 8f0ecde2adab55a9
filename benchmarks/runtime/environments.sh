#!/bin/sh
# Environments of the peers that clash with ours: FOLDER/adapterhub, FOLDER/easysteer (without its vLLM), FOLDER/llama.cpp,
# FOLDER/pyreft and FOLDER/repeng, or those that are named.
#
#     sh benchmarks/runtime/environments.sh FOLDER [NAME...]
#
# llama-cpp-python is compiled here for this machine's own instructions, which takes minutes and needs a C++ compiler.
set -eu
folder=${1:?give a folder for the environments}
shift
mkdir -p "$folder"

for name in ${*:-adapterhub easysteer llama.cpp pyreft repeng}; do
    "${PYTHON:-python3}" -m venv "$folder/$name"
    pip="$folder/$name/bin/pip install --quiet --disable-pip-version-check"
    case $name in
    adapterhub)
        $pip torch==2.13.0 adapters==1.3.0
        ;;
    easysteer) # what its steering code imports beside vLLM
        $pip torch==2.13.0 transformers==4.57.6 msgspec pydantic gguf
        ;;
    llama.cpp)
        $pip llama-cpp-python
        ;;
    pyreft) # its own requirements, such as Jupyter and an old seaborn, are left out
        $pip torch==2.13.0 transformers==4.45.1 accelerate datasets evaluate matplotlib scikit-learn
        $pip --no-deps pyreft==0.1.0 pyvene==0.1.8
        ;;
    repeng)
        $pip torch==2.13.0 transformers==4.45.1 'numpy<2' repeng==0.4.0
        ;;
    *)
        echo "no peer $name; known: adapterhub easysteer llama.cpp pyreft repeng" >&2
        exit 2
        ;;
    esac
done
