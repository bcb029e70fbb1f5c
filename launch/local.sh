#!/usr/bin/env bash
# Start a run on this machine:  launch/local.sh RANKS CONFIG [key=value ...]
# RANKS is a number, or "auto": one rank per GPU, or two where there is none.
# Ctrl-C and TERM reach every rank, which save and stop. When one rank dies the others are ended, and the exit status
# is that of the rank that failed first.
set -u

if [ $# -lt 2 ]; then
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
fi
ranks=$1
shift
if [ "$ranks" = auto ]; then
    ranks=$( (nvidia-smi -L 2>/dev/null || true) | grep -c '^GPU')
    [ "$ranks" -gt 0 ] || ranks=2
fi
case $ranks in
    '' | *[!0-9]* | 0*) echo "launch/local.sh: RANKS is '$ranks'; give a number from 1, or auto" >&2; exit 2 ;;
esac

python=${PYTHON:-python3}
if [ -z "${MASTER_PORT:-}" ]; then
    # This script starts over with a port that it holds: bound until the last rank ends, so that nobody else is given
    # it, and not listening, so that rank 0 may (both sides allow reuse). A port that was only looked up could be taken
    # before rank 0 listens.
    exec "$python" -c '
import os, socket, sys
held = socket.socket()
held.bind(("127.0.0.1", 0))
held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not before: two that reuse may be given the same port
held.set_inheritable(True)
os.environ["MASTER_PORT"] = str(held.getsockname()[1])
os.execvp("bash", ["bash", *sys.argv[1:]])
' "$0" "$ranks" "$@"
fi
grace=${LLAMA_DIST_GRACE_SECONDS:-60}   # from the first rank's failure until the others are killed
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export MASTER_ADDR=127.0.0.1
export WORLD_SIZE=$ranks
# All ranks are here: gloo must not depend on what this machine's name resolves to.
[ -d /sys/class/net/lo ] && export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}

pids=()
stop() { for pid in "${pids[@]}"; do kill -s "$1" "$pid" 2>/dev/null; done; }
# Ctrl-C reaches the ranks too, but until they train they ignore it, as whatever a script starts in the background does.
trap 'echo "launch/local.sh: stopping; ranks that train finish their step and save" >&2; stop TERM' INT TERM
trap 'stop USR1' USR1
trap 'stop HUP' HUP

for ((rank = 0; rank < ranks; rank++)); do
    RANK=$rank LOCAL_RANK=$rank "$python" -m llama_dist train "$@" &
    pids+=($!)
done

status=0
killed_at=
while [ ${#pids[@]} -gt 0 ]; do
    # In steps, and not by `wait -n`: older shells cannot say which process it was that ended.
    sleep 0.2 &
    wait $!
    for i in "${!pids[@]}"; do
        kill -0 "${pids[i]}" 2>/dev/null && continue
        wait "${pids[i]}"
        code=$?
        unset "pids[i]"
        if [ $code -ne 0 ] && [ $status -eq 0 ]; then
            status=$code
            killed_at=$((SECONDS + grace))   # until then the others may notice by themselves, and say what they miss
        fi
    done
    if [ -n "$killed_at" ] && [ $SECONDS -ge $killed_at ]; then
        stop KILL
    fi
done
exit $status
