#!/usr/bin/env bash
# Put ONNX Runtime's C headers into a folder, from an npm package that carries them (150 MB are downloaded).
# ONNX Runtime's own release archives have them too, in include/.
#
#     examples/c/headers.sh FOLDER
set -euo pipefail
folder=$(realpath "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
npm pack --silent com.github.asus4.onnxruntime@0.4.9 > /dev/null
echo "e59788788818fdde1b2e522e766a21ba0f7d8391de55737abf81e32cc801785d  com.github.asus4.onnxruntime-0.4.9.tgz" | sha256sum --check --quiet
mkdir -p "$folder"
tar -xzf ./*.tgz --directory "$folder" --strip-components 7 \
    'package/Plugins/iOS~/onnxruntime.xcframework/ios-arm64/onnxruntime.framework/Headers'
