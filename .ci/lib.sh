# shellcheck shell=bash
# What .ci/run and .ci/matrix share. Sourced; sets `here` (the checkout) and `work` (removed at exit).
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
declare -A beside_pid=()
trap clean_up EXIT
# pip compiles every module that it installs, half of its time here; Python compiles those that are imported.
export PIP_NO_COMPILE=0 # pip reads a negative option's variable as the option without its "no": false is --no-compile
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_PROGRESS_BAR=off PIP_QUIET=1 HF_HUB_OFFLINE=1

# Ends what still runs beside, with its children, and removes $work.
clean_up() {
  local pid
  for pid in "${beside_pid[@]}"; do kill -- "-$pid" 2>/dev/null || true; done
  wait
  rm -rf "$work"
}

# Runs the function NAME beside what follows, in a process group of its own. `finish NAME` waits for it, prints what it
# printed, and fails when it failed.
beside() {
  set -m
  ("$1") >"$work/$1.log" 2>&1 </dev/null &
  set +m
  beside_pid[$1]=$!
}

finish() {
  local status=0
  wait "${beside_pid[$1]}" || status=$?
  unset "beside_pid[$1]"
  cat "$work/$1.log"
  return "$status"
}

say() { printf '\n=== %s (%ss)\n' "$*" "$SECONDS"; }

# A fresh copy in $work/NAME of the files that a clone would have, uncommitted changes included: links stay links.
checkout() {
  mkdir -p "$work/$1"
  (cd "$here" && git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' f; do if [ -e "$f" ] || [ -L "$f" ]; then printf '%s\0' "$f"; fi; done |
    tar --null --no-recursion --files-from=- -cf -) | tar -xf - -C "$work/$1"
  git -C "$work/$1" init -q && git -C "$work/$1" add -A
  cd "$work/$1" || return
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
