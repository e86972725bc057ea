# CLIP's ViT-B/16 and GPT-2, like config/gpt2_vit.py, but the encoder is trained as well, at a tenth
# of the learning rate. Not run on real weights yet.
#   python prepare_flickr.py --image_size 224 --tokenizer gpt2 --keep_used \
#       --out_dir data/flickr30k-gpt2
data_dir = "data/flickr30k-gpt2"
out_dir = "out/gpt2_clip"
encoder = "openai/clip-vit-base-patch16"
decoder = "gpt2"
image_size = 224
block_size = 96
max_iters = 10000
batch_size = 64
learning_rate = 5e-5
lr_scale = "^encoder=0.1 cross=10"
warmup_iters = 500
dropout = 0.1
flip = True
crop = 0.7
eval_interval = 1000
