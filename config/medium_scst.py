# Second stage of config/medium.py: self-critical training, which tunes the captioner for CIDEr-D.
#   python train.py config/medium_scst.py --init_from=out/medium
data_dir = "data/flickr8k-260"
out_dir = "out/medium_scst"
lr_scale = "encoder.network=0.1 encoder.stem.last=0.1"
max_iters = 600
samples = 5
views = 8
flip = True
crop = 0.6
jitter = 0.2
dropout = 0.0
word_dropout = 0.0
batch_size = 32
learning_rate = 1e-4
warmup_iters = 20
log_interval = 20
eval_interval = 300
