# Ray over the nodes of this allocation, and on the first of them the job. The lines above say what is this job's own.
set -euo pipefail
umask 077
cd "$folder"
echo "onestage: attempt $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST" >&2
rm -f exit_code

head='' workers='' training='' asked='' signalled='' result=0
temp=$(mktemp -d /tmp/onestage-XXXXXX) # short: the path of a Unix socket has 107 bytes at most

say() { echo "onestage: $*" >&2; }

# A process without Slurm's variables, of which Lightning would take some for its own, in a session of its own, which
# a scancel does not reach: only this script is asked to end, and asks the training.
apart() {
  unset "${!SLURM_@}"
  exec setsid "$@"
}

# Waits for a process to its end, which a signal to this script is not; its exit code as $result.
await() {
  local code
  while :; do
    signalled='' code=0
    wait "$1" || code=$?
    [ "$code" = 127 ] || result=$code
    [ -n "$signalled" ] || return 0
  done
}

# shellcheck disable=SC2317,SC2329 # a trap calls it
heed() {
  signalled=1
  asked=${asked:-$1}
  [ -z "$training" ] || kill -TERM "$training" 2> /dev/null || true
}

# shellcheck disable=SC2317,SC2329 # a trap calls it
finish() {
  local code=$?
  trap - EXIT
  trap '' TERM USR1
  disown -a # whose end is meant, and is not to be told
  [ -z "$workers" ] || kill -USR2 "$workers" 2> /dev/null || true
  [ -z "$training" ] || pkill -KILL -s "$training" || true
  [ -z "$head" ] || pkill -KILL -s "$head" || true
  if [ -n "$workers" ]; then
    for _ in {1..50}; do
      kill -0 "$workers" 2> /dev/null || break
      sleep 0.2
    done
    kill -KILL "$workers" 2> /dev/null || true
  fi
  rm -rf "$temp" token
  if [ "$code" = 75 ] && [ "$asked" = limit ] && [ "$requeue" = true ]; then
    say "the time limit is near: the job is queued again, to go on from its checkpoint"
    if scontrol requeue "$SLURM_JOB_ID"; then
      exit 0
    fi
    say "Slurm does not queue it again; go on with: onestage submit train cluster=slurm resume=$(cat run 2> /dev/null || true)"
  fi
  echo "$code" > exit_code.new && mv exit_code.new exit_code
  exit "$code"
}

# On each other node: Ray, until the step is told USR2. A TERM, of scancel, is for the training alone to heed.
# shellcheck disable=SC2317,SC2329 # srun calls it
worker() {
  local address=$1 cpus=$2 gpus=$3 memory=$4 ended='' temp ray
  shift 4
  temp=$(mktemp -d /tmp/onestage-XXXXXX)
  trap : TERM
  trap 'ended=1' USR2
  apart "$@" -m ray.scripts.scripts start --block --address="$address" \
    --node-ip-address="$("$@" -m onestage.cluster.slurm_node address "${address%:*}")" \
    --num-cpus="$cpus" --num-gpus="$gpus" --object-store-memory="$memory" --temp-dir="$temp" \
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 &
  ray=$!
  while [ -z "$ended" ] && kill -0 "$ray" 2> /dev/null; do
    wait "$ray" || true
  done
  pkill -KILL -s "$ray" || true
  rm -rf "$temp"
}

start_head() {
  local gcs dashboard client ports
  for _ in 1 2 3; do # another job on this node may be faster with a port
    ports=$("${python[@]}" -m onestage.cluster.slurm_node ports 3)
    read -r gcs dashboard client <<< "$ports"
    address=$host:$gcs
    apart "${python[@]}" -m ray.scripts.scripts start --block --head --node-ip-address="$host" --port="$gcs" \
      --dashboard-host=127.0.0.1 --dashboard-port="$dashboard" --ray-client-server-port="$client" \
      --num-cpus="$cpus" --num-gpus="$gpus" --object-store-memory="$memory" --temp-dir="$temp" \
      --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 >> head.log 2>&1 &
    head=$!
    "${python[@]}" -m onestage.cluster.slurm_node wait "$address" 1 "$wait_s" "$head" > /dev/null &
    await $!
    [ -z "$asked" ] || exit 75
    [ "$result" != 0 ] || return 0
    pkill -KILL -s "$head" || true
  done
  say "Ray's head does not start within $wait_s s on $SLURMD_NODENAME: see $folder/head.log"
  exit 1
}

trap finish EXIT
trap 'heed stop' TERM
trap 'heed limit' USR1

if [ "${#modules[@]}" != 0 ]; then
  set +u # what `module` is made of has unset variables
  module load "${modules[@]}"
  set -u
fi
if [ -d "$folder/code" ]; then
  export PYTHONPATH="$folder/code${PYTHONPATH:+:$PYTHONPATH}"
fi
head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n' > token
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_USAGE_STATS_ENABLED=0 RAY_worker_niceness=0

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
host=127.0.0.1
for node in "${nodes[@]}"; do
  if [ "$node" != "$SLURMD_NODENAME" ]; then
    peer=$(scontrol --oneliner show node "$node" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
    host=$("${python[@]}" -m onestage.cluster.slurm_node address "$peer")
    break
  fi
done
start_head
if [ "${#nodes[@]}" -gt 1 ]; then
  others=$((${#nodes[@]} - 1))
  srun --overlap --no-kill --kill-on-bad-exit=0 --export=ALL --label --nodes="$others" --ntasks="$others" \
    --ntasks-per-node=1 --cpus-per-task="$cpus" --exclude="$SLURMD_NODENAME" \
    bash -c "$(declare -f apart worker); worker \"\$@\"" worker "$address" "$cpus" "$gpus" "$memory" "${python[@]}" \
    >> workers.log 2>&1 &
  workers=$!
  "${python[@]}" -m onestage.cluster.slurm_node wait "$address" "${#nodes[@]}" "$wait_s" "$head" > alive &
  await $!
  [ -z "$asked" ] || exit 75
  [ "$result" = 0 ] || say "after $wait_s s $(cat alive) of ${#nodes[@]} nodes have joined: see $folder/workers.log"
fi

words=("${first[@]}")
if [ -s run ]; then
  words=("${again[@]}" "resume=$(cat run)")
elif [ -n "$begun" ] && [ -e "$begun" ]; then
  words=("${again[@]}")
fi
export RAY_ADDRESS="$address" ONESTAGE_JOB="$job"
if [ "$verb" = train ]; then
  export ONESTAGE_RUN_FILE="$folder/run"
fi
apart "${python[@]}" -m onestage.cli "${words[@]}" &
training=$!
[ -z "$asked" ] || kill -TERM "$training"
await "$training"
exit "$result"
