# Second stage of config/small.py: self-critical training, which tunes the captioner on CIDEr.
#   python train.py config/small_scst.py --init_from=out/small
data_dir = "data/flickr8k-260"
out_dir = "out/small_scst"
max_minutes = 5
samples = 5
views = 2
flip = True
dropout = 0.0
word_dropout = 0.0
batch_size = 32
learning_rate = 1e-4
warmup_iters = 20
log_interval = 20
eval_interval = 200
