# Falcon-7B with LoRA behind a frozen CLIP ViT-B/16, for one 80 GB GPU. The picture is a soft prompt of 32 vectors.
#   python prepare_flickr.py --image_size 224 --tokenizer tiiuae/falcon-7b --out_dir data/flickr30k-falcon
# Memory by arithmetic: 6.92 G frozen parameters in bfloat16 are 13.8 GB, shared by student and teacher; LoRA of rank 16 on all
# layers of the blocks has 33 M, with gradient, two moments, teacher and themselves 0.7 GB in float32. Of the activations only
# each block's input is kept: 32 blocks × 8 pictures × (5 captions of 15 tokens + 32) × 4,544 × 2 bytes = 0.25 GB, and what one
# block needs. Not run yet: neither weights nor such a GPU were to be had where this was written.
data_dir = "data/flickr30k-falcon"
out_dir = "out/falcon_lora"
encoder = "openai/clip-vit-base-patch16"
freeze_encoder = True
decoder = "tiiuae/falcon-7b"
lora_rank = 16
bridge = "prefix"
n_query = 32
image_size = 224
block_size = 128
max_iters = 5000
batch_size = 64
grad_accum = 8
recompute = True
dtype = "bfloat16"
learning_rate = 2e-4
warmup_iters = 200
eval_interval = 1000
eval_images = 200
