#!/bin/bash
# A quarter of an hour on one large GPU, the most valuable part first; every part has a time limit.
#
#     bash tests/gpu.sh                         on a machine with a GPU
#     DEVICE=cpu STEPS=5 bash tests/gpu.sh      anywhere, to rehearse
#     PARTS="run speed" bash tests/gpu.sh       some parts, in that order
#
# run:    the CUDA tests; the README's first command; a run that is stopped by SIGTERM and resumed.
# speed:  tests/benchmark.py gpu.
# scale:  4 layers, 512 wide, on the text in $CORPUS (default: data/english), 256 windows a step:
#         a plain and a local start, each masked at random, by entropy, and at random with
#         distillation, side by side, for $SCALE_SECONDS at most. SEEDS="0 1" for more.
# glue:   SST-2 (a fifth of it) and MRPC for the models of scale, from $GLUE_DIR.
# Each part leaves a JSON file in $OUT (default: runs/gpu), and all of them a table.
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda} OUT=${OUT:-runs/gpu} CORPUS=${CORPUS:-data/english}
PARTS=${PARTS:-run speed scale glue} SEEDS=${SEEDS:-0} SCALE_SECONDS=${SCALE_SECONDS:-360}
SCALE_STEPS=${SCALE_STEPS:-${STEPS:-3000}}
SLACK=$([ "$DEVICE" = cpu ] && echo 4 || echo 1)  # a CPU needs longer even for few steps
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
mkdir -p "$OUT" runs
[ -e "$CORPUS" ] || CORPUS=docs

part_run() {
    timeout $((90 * SLACK)) python -m pytest -q -k cuda tests >runs/gpu-tests.log 2>&1
    echo "CUDA tests: exit $?: $(tail -1 runs/gpu-tests.log)"
    main="python train.py --masking entropy --device $DEVICE"  # the README's first command
    [ "$STEPS" ] && main="$main --steps $STEPS --teacher-steps $STEPS"
    timeout $((120 * SLACK)) $main --out runs/gpu-main >runs/gpu-main.log 2>&1
    echo "main job: exit $?"
    # The same once more, stopped after the first line of its log and resumed.
    $main --out runs/gpu-resumed >runs/gpu-resumed.log 2>&1 &
    for _ in $(seq $((480 * SLACK))); do
        [ -s runs/gpu-resumed/log.jsonl ] && break
        sleep 0.25
    done
    kill -TERM $!
    wait $!
    echo "stopped: exit $?"
    timeout $((60 * SLACK)) python train.py --resume runs/gpu-resumed --device "$DEVICE" >>runs/gpu-resumed.log 2>&1
    echo "resumed: exit $?"
    cmp runs/gpu-main/model.safetensors runs/gpu-resumed/model.safetensors && echo "same weights"
    collect run runs/gpu-main runs/gpu-resumed
}

part_speed() {
    timeout 200 python tests/benchmark.py gpu --json "$OUT/speed.json"
}

part_scale() {
    shape="--corpus $CORPUS --vocab-size 8192 --preset small --batch-size 256 --lr 5e-4
        --steps $SCALE_STEPS --device $DEVICE"
    [ "$DEVICE" = cpu ] && shape="$shape --preset tiny --batch-size 8 --eval-every $SCALE_STEPS"
    for seed in $SEEDS; do
        teacher=runs/gpu-teacher-$seed
        [ -e $teacher/exam.json ] || python train.py $shape --masking random --seed $((seed + 100)) \
            --out $teacher >$teacher.log 2>&1
        for start in local plain; do
            for arm in random entropy random-kd; do
                out=runs/gpu-$start-$arm-$seed
                flags="--masking ${arm%-kd} --seed $seed --teacher $teacher --out $out"
                [ $start = plain ] && flags="$flags --plain-start"
                [ $arm = random-kd ] && flags="$flags --kd-weight 0.5"
                [ -e $out/exam.json ] || python train.py $shape $flags >$out.log 2>&1 &
            done
        done
        wait
    done
}

part_glue() {
    for run in runs/gpu-local-* runs/gpu-plain-*; do
        [ -e "$run/exam.json" ] || continue
        for task in sst2 mrpc; do
            fraction=$([ $task = sst2 ] && echo "--fraction 0.2")
            python glue.py --task $task --model "$run" --device "$DEVICE" --lr 5e-5 $fraction \
                --json "runs/gpu-$task-$(basename "$run").json" >"$run-$task.log" 2>&1 &
        done
    done
    wait
}

collect() {  # NAME RUN...: one JSON file of the runs' exams and logs, and a line for each
    python - "$OUT/$1.json" "${@:2}" <<'PYTHON'
import json, sys
from pathlib import Path
found = {}
for run in map(Path, sys.argv[2:]):
    if (run / "log.jsonl").exists():
        log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        exam = json.loads((run / "exam.json").read_text()) if (run / "exam.json").exists() else {}
        kept = {key: exam.get(key) for key in ("args", "masked", "seconds", "last", "baseline")}
        found[run.name] = {"log": log, **kept}
        last = [line for line in log if "exam" in line][-1:] or [{"step": 0, "exam": {}}]
        print(f"{run.name:<32} step {last[0]['step']:>6,}", *(
            f"{key} {value:.4f}" for key, value in last[0]["exam"].items()))
Path(sys.argv[1]).write_text(json.dumps(found, indent=1))
PYTHON
}

limited() {  # SECONDS FUNCTION: with everything that it starts
    export -f "$2"
    export DEVICE CORPUS SCALE_STEPS SEEDS
    timeout "$1" bash -c "$2" || echo "$2 was stopped or failed: exit $?"
}

for part in $PARTS; do
    echo "== $part"
    case $part in
    scale)
        limited "$SCALE_SECONDS" part_scale
        collect scale runs/gpu-teacher-* runs/gpu-local-* runs/gpu-plain-*
        ;;
    glue)
        limited 120 part_glue
        python - "$OUT/glue.json" runs/gpu-sst2-*.json runs/gpu-mrpc-*.json <<'PYTHON'
import json, sys
from pathlib import Path
found = {Path(path).stem: json.loads(Path(path).read_text()) for path in sys.argv[2:]
         if Path(path).exists()}
for name, run in found.items():
    print(f"{name:<40}", *(f"{key} {value:.4f}" for key, value in run["last"].items()))
Path(sys.argv[1]).write_text(json.dumps(found, indent=1))
PYTHON
        ;;
    *) "part_$part" ;;
    esac
    echo "== $part ended after $SECONDS s"
done
