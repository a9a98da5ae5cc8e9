#!/bin/sh
# Runs the tests that it is given, those of the native engine by `make sanitize`, with AddressSanitizer and
# UndefinedBehaviorSanitizer built into the engine's library.
# Python itself is not built with them, so the runtime is loaded before everything else. Leaks are not looked for:
# Python keeps memory until it exits.
set -eu
bin=${VENV_BIN:+$VENV_BIN/}
runtime="$(${CXX:-c++} -print-file-name=libasan.so) $(${CXX:-c++} -print-file-name=libubsan.so) $(${CXX:-c++} -print-file-name=libstdc++.so)"
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export LLAMA_ATTN_CACHE="$cache" LLAMA_ATTN_CXXFLAGS="-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
"${bin}llama-attn" build
# Without capture, since a library that is stopped in the middle takes the captured report with it.
LD_PRELOAD="$runtime" ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
    "${bin}python" -m pytest -q -s -p no:cacheprovider "$@"
