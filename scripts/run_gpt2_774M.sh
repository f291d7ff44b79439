#!/bin/bash
# GPT-2 774M on 150 billion tokens of FineWeb: llm.c's scripts/run_gpt2_774M.sh.
#
# model     d36: 36 layers, 1280 channels, 20 heads; 774,090,240 parameters with the padded vocabulary
# tokens    286,102 steps x 524,288 = 150 billion
# FLOPs     4.93 billion a token (6 N + 6 L C T) = 7.4e20
# time      llm.c: 1.7 s a step, 135 hours, about $2000, on 8 A100 80 GB (its figures). Not measured here on 8 GPUs
# loss      to beat: OpenAI's GPT-2 774M has 3.001 on FineWeb's validation shard and 0.432 on HellaSwag. An estimate
#           of where this ends: 2.8 and 0.45
# data      llm.c's dev/data/fineweb.py -v 100B makes the shards (this is one and a half epochs of them); this is run
#           beside its dev folder
#
# For fewer GPUs lower gpus: -d stays, so more micro-steps make the same update. For less memory lower -b.

gpus=8
out_dir=log_gpt2_774M

exec "$(dirname "$0")/until_done.sh" "$out_dir" mpirun -np "$gpus" python -m llmc.train \
    -i "dev/data/fineweb100B/fineweb_train_*.bin" \
    -j "dev/data/fineweb100B/fineweb_val_*.bin" \
    -o "$out_dir" \
    -e d36 \
    -b 32 -t 1024 -d 524288 \
    -x 286102 \
    -l 0.00025 -q 0.0 -u 700 -c 0.1 \
    -v 250 -s 300000 -g 144 -h 1 \
    -r 0 -z 1 \
    -n 4000 -y 1
