# Second stage of config/small.py: self-critical training, which tunes the captioner for CIDEr-D.
#   python train.py config/small_scst.py --init_from=out/small
data_dir = "data/flickr8k-320"
out_dir = "out/small_scst"
lr_scale = "encoder.network=0.1 encoder.stem.last=0.1"
max_iters = 450
samples = 5
views = 6
flip = True
crop = 0.6
jitter = 0.2
dropout = 0.15
word_dropout = 0.0
batch_size = 32
learning_rate = 1e-4
warmup_iters = 20
log_interval = 20
eval_interval = 225
