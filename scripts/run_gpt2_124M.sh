#!/bin/bash
# GPT-2 124M on 10 billion tokens of FineWeb: llm.c's scripts/run_gpt2_124M.sh.
#
# model     d12: 12 layers, 768 channels, 12 heads; 124,475,904 parameters with the padded vocabulary
# tokens    18,865 steps (one epoch) x 524,288 = 9.9 billion
# FLOPs     803 million a token (6 N + 6 L C T) = 7.9e18
# time      llm.c: 300 ms a step, 94 minutes, about $20, on 8 A100 80 GB (its figures). Not measured here on 8 GPUs
# loss      to beat: OpenAI's GPT-2 124M has 3.425 on FineWeb's validation shard and 0.294 on HellaSwag. An estimate
#           of where this ends: 3.3 and 0.30
# data      llm.c's dev/data/fineweb.sh 103 downloads the shards, already tokenised; this is run beside its dev folder
#
# For fewer GPUs lower gpus: -d stays, so more micro-steps make the same update. For less memory lower -b.

gpus=8
out_dir=log_gpt2_124M

exec "$(dirname "$0")/until_done.sh" "$out_dir" mpirun -np "$gpus" python -m llmc.train \
    -i "dev/data/fineweb10B/fineweb_train_*.bin" \
    -j "dev/data/fineweb10B/fineweb_val_*.bin" \
    -o "$out_dir" \
    -e d12 \
    -b 64 -t 1024 -d 524288 \
    -l 0.0006 -q 0.0 -u 700 -c 0.1 \
    -v 250 -s 20000 -g 144 -h 1 \
    -r 0 -z 1 \
    -n 5000 -y 1
