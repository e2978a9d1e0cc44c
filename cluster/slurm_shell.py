"""What the batch script of a `slurm` job does, the same for every job: `bin/job.sh` in the job's folder.

It runs on the first node, outside of any container, so it is bash. It has two steps run on all nodes, `look` and `keep`
(`slurm_look.py`, `slurm_keep.py`), passes on what Slurm and the user ask for, and has Slurm start the job again.

    JOB/start-N/asked      what is asked of the run: `leave` (save, and go on later), `stop` (save and end), `now`
    JOB/start-N/code       how the run ended; without it the start ended without a word
    JOB/start-N/lost       a node did not come to its end
    JOB/start-N/begun      the run had begun
    JOB/start-N/unfit      nodes that are not to be in the next start, separated by commas
    JOB/exit               the exit code, once the job is over for good
"""

from __future__ import annotations

from .restarts import LEFT, LEFT_EARLY, UNFIT

KILLED = 137
"""As a shell has it for what SIGKILL ended."""

NOT_SHARED = 9
"""Exit code of a node that does not see the job's folder."""

JOB_SH = f"""
umask 077
START="$JOB/start-${{SLURM_RESTART_COUNT:-0}}"
TERMED=no
mkdir -p "$START" || exit 2
rm -f "$JOB/exit"
export PYTHONPATH="$JOB/package" PYTHONUNBUFFERED=1
# What sbatch or salloc was told would contradict what the steps are.
unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE SLURM_EXPORT_ENV

ask() {{
  if [[ $1 == leave && -e "$START/asked" ]]; then return; fi
  printf %s "$1" > "$START/asked.new" && mv "$START/asked.new" "$START/asked"
}}

asked() {{
  if [[ -e "$START/asked" ]]; then cat "$START/asked"; fi
}}

ended() {{
  trap - EXIT
  rm -rf "$JOB/token" "$JOB/env.json" "$JOB/driver.json" "$JOB/package"
  printf %s "$1" > "$JOB/exit.new" && mv "$JOB/exit.new" "$JOB/exit"
  exit "$1"
}}

unfit() {{
  echo "error: $1: this line failed on ${{SLURMD_NODENAME:-this node}}, see above" >&2
  ended 1
}}

trap 'ask leave' USR1
trap 'ask stop' USR2
trap 'ask now' HUP
trap 'TERMED=yes; ask leave' TERM
trap 'ended $?' EXIT

# A wait that a signal has ended says nothing of what it waited for.
finished() {{
  local again
  while wait "$1"; CODE=$?; kill -0 "$1" 2> /dev/null; do :; done
  if (( CODE > 128 )); then
    wait "$1" 2> /dev/null
    again=$?
    if (( again != 127 )); then CODE=$again; fi
  fi
}}

# Tried before anything of ours can run: without the folder there is nothing that could say so.
ENTER='
if [[ ! -r "$1/proof" ]]; then
  echo "error: node ${{SLURMD_NODENAME:-?}}: $1 is not there." \
    "All nodes must see the folder above it: checkpoint.path (--to of prepare), or where ftlaunch was called." >&2
  exit {NOT_SHARED}
fi
if ! command -v "$2" > /dev/null; then
  echo "error: node ${{SLURMD_NODENAME:-?}}: cluster.python: $2 is not there" >&2
  exit {NOT_SHARED}
fi
exec "$2" "$1/bin/$3" "$1" "$4"
'

step() {{
  exec "${{STEP[@]}}" "${{@:2}}" "${{INSIDE[@]}}" bash -c "$ENTER" ftlaunch "$JOB" "$PYTHON" "$1" "$START" < /dev/null
}}

run_job() {{
  step look --kill-on-bad-exit=0 &
  finished $!
  if (( CODE != 0 )) && [[ -z "$(asked)" ]]; then
    case $CODE in
      1 | {NOT_SHARED} | 126 | 127) ended 1 ;;
      *) ended 2 ;;
    esac
  fi
  if [[ -z "$(asked)" ]]; then
    # A node that is lost takes the whole job along, which then begins again.
    step keep --kill-on-bad-exit=1 &
    finished $!
    # A node that was lost, although the others may have saved.
    if (( CODE != 0 )); then touch "$START/lost"; fi
    if [[ -r "$START/code" ]]; then CODE=$(cat "$START/code"); else CODE={KILLED}; fi
  else
    CODE={LEFT}
  fi
  go_on_or_end
}}

# All nodes that the job is to be without: those that it was without before, and those that are unfit.
without() {{
  local before
  before=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%x)
  if [[ -n $before && $before != "(null)" ]]; then printf %s, "$before"; fi
  cat "$START/{UNFIT}"
}}

# Whether the partition has nodes enough besides: a job that asks for more than there are would wait for ever.
others_suffice() {{
  local up
  up=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %t' |
    grep -Ev ' .*(down|drain|drng|fail|maint|[*])' | cut -d' ' -f1 | sort -u)
  (( $(comm -23 <(echo "$up") <(scontrol show hostnames "$(without)" | sort -u) | grep -c .) >= NODES ))
}}

# Only of a job that waits can this be changed.
exclude() {{
  if [[ -e "$START/{UNFIT}" ]]; then scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(without)"; fi
}}

# Slurm may send SIGTERM, to everything that the job runs, before its command has said that all is well.
requeued() {{
  (
    trap '' TERM
    scontrol requeue "$SLURM_JOB_ID"
    CODE=$?
    exclude
    exit "$CODE"
  ) || [[ $TERMED == yes ]]
}}

go_on_or_end() {{
  case $CODE in
    0 | 1 | 2 | 130) ended "$CODE" ;;
  esac
  case $(asked) in
    stop | now) ended 130 ;;
  esac
  if [[ $TERMED == yes ]]; then
    # Slurm ends the job itself: for good, or it starts it again.
    trap - EXIT
    exit "$CODE"
  fi
  if [[ -e "$START/{UNFIT}" ]] && ! others_suffice; then
    echo "error: partition $SLURM_JOB_PARTITION has too few nodes besides $(cat "$START/{UNFIT}")" >&2
    ended 2
  fi
  if [[ $REQUEUE == yes ]] && requeued; then
    echo "the job goes back into the queue, and on from what is saved"
    if [[ -e "$START/{UNFIT}" ]]; then echo "it is not to have $(cat "$START/{UNFIT}") again"; fi
    trap - EXIT
    exit 0
  fi
  if (( CODE == {LEFT} || CODE == {LEFT_EARLY} )); then ended 130; fi
  echo "error: the run was killed" >&2
  ended 2
}}
"""
