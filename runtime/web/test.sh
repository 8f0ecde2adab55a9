#!/usr/bin/env bash
# Build the loader and the page, and test them against reft_edge's own runtime on an exported folder.
#
#     PYTHON=.venv/bin/python runtime/web/test.sh EXPORT ADAPTER...
#
# The page's tests need Chromium (/usr/bin/chromium, or REFT_WEB_CHROMIUM) and are left out without it.
# REFT_WEB_SCREENSHOT=page.png keeps pictures of the page; REFT_WEB_LENGTH="--prompts 1 --tokens 12" asks less of a slow model.
set -euo pipefail
export REFT_WEB_EXPORT=$(realpath "$1")
shift
export REFT_WEB_ADAPTERS=$(realpath "$@" | paste -sd ' ')
python=$(command -v "${PYTHON:-python3}")
[[ $python == /* ]] || python=$PWD/$python
[[ -z ${REFT_WEB_SCREENSHOT:-} ]] || export REFT_WEB_SCREENSHOT=$(realpath "$REFT_WEB_SCREENSHOT")
cd "$(dirname "$0")"
export REFT_WEB_VECTORS=$(mktemp -d)
export REFT_WEB_ANSWERS=$REFT_WEB_VECTORS/answers.json
trap 'rm -rf "$REFT_WEB_VECTORS"' EXIT

npm ci --no-audit --no-fund --loglevel=error
npm run --silent check
npm run --silent build -- --logLevel warn
"$python" test/vectors.py "$REFT_WEB_EXPORT" "$REFT_WEB_VECTORS"
# shellcheck disable=SC2086
"$python" test/answers.py "$REFT_WEB_EXPORT" "$REFT_WEB_ANSWERS" $REFT_WEB_ADAPTERS ${REFT_WEB_LENGTH:-}
[[ -x ${REFT_WEB_CHROMIUM:-/usr/bin/chromium} ]] || echo "there is no Chromium here: the page is built, not tested" >&2
npm test --silent
