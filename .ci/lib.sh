# shellcheck shell=bash
# What .ci/run and .ci/matrix share. Sourced; sets `here` (the checkout) and `work` (removed at exit).
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# pip compiles every module that it installs, half of its time here; Python compiles those that are imported.
export PIP_NO_COMPILE=0 # pip reads a negative option's variable as the option without its "no": false is --no-compile
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_QUIET=1 HF_HUB_OFFLINE=1

say() { printf '\n=== %s (%ss)\n' "$*" "$SECONDS"; }

# A fresh copy in $work/NAME of the files that a clone would have, uncommitted changes included: links stay links.
checkout() {
  mkdir -p "$work/$1"
  (cd "$here" && git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' f; do if [ -e "$f" ] || [ -L "$f" ]; then printf '%s\0' "$f"; fi; done |
    tar --null --no-recursion --files-from=- -cf -) | tar -xf - -C "$work/$1"
  git -C "$work/$1" init -q && git -C "$work/$1" add -A
  cd "$work/$1"
}

# pytest writes what it ran to $work/LEG.xml; the figure is held against .ci/expected_tests.
count() { python3 "$here/.ci/count_tests.py" "$work/$1.xml" "$1" "$here/.ci/expected_tests" "${@:2}"; }

# Runs the function of a leg, leg_NAME or for NAME-VERSION leg_NAME NAME-VERSION, and notes the time it took.
minutes=""
run_leg() {
  local start=$SECONDS
  say "$1: start"
  "leg_${1%%-*}" "$1"
  say "$1: passed"
  minutes+="$(printf '%-8s %4d s' "$1" $((SECONDS - start)))"$'\n'
  rm -rf "${work:?}/$1"
}

say_minutes() { printf '\n%s%-8s %4d s\n' "$minutes" all "$SECONDS"; }
