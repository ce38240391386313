"""Settings of the tiny architectures: COMMON for all, and a few for each family."""

VOCAB_SIZE = 97
WINDOW = 4  # tokens; shorter than the rows that the checks use, so that it hides some of them
COMMON = {  # the settings that most architectures have, under Hugging Face's names
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128, "n_ctx": 128}
EXPERTS = {
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
ROUTED = {  # DeepSeek's names for the same: a dense layer first, then experts
    **EXPERTS,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
STATE_SPACE = {
    "state_size": 8,
    "conv_kernel": 4,
    "n_groups": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "time_step_rank": 4,
    "time_step_limit": (0.001, 100.0),
}
SCALED = {
    "logits_scaling": 2.0,
    "attention_multiplier": 0.35,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.5,
    "scale_depth": 1.4,
    "scale_emb": 3.0,
    "dim_model_base": 16,
}
SLIDING = {"sliding_window": WINDOW, "sliding_window_pattern": 2}
LAYER_TYPES = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
MULTI_QUERY = {**GPT, "num_key_value_heads": None}
STABLELM = {"use_qkv_bias": False, "partial_rotary_factor": 0.5, "qk_layernorm": True}
LONG = {"original_max_position_embeddings": 512}
LONG_MOE = {
    **LONG,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4,
    "short_mscale": 1.0,
    "long_mscale": 1.0,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MINISTRAL_ROPE = {**LONG, "rope_theta": 10_000.0, "llama_4_scaling_beta": 0.1}
OPENELM = {
    "num_transformer_layers": 2,
    "model_dim": 32,
    "ffn_dim_divisor": 8,
    "num_query_heads": [4, 4],
    "num_kv_heads": [2, 2],
    "ffn_multipliers": [2.0, 2.0],
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "tie_word_embeddings": True,
}
EXAONE4 = {"sliding_window": WINDOW, "sliding_window_pattern": "LG"}
BAICHUAN = {"sliding_window": WINDOW, "sliding_window_layers": [0], "conv_window": 2}
DBRX = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
}
GLM = {"rope_scaling": None, "partial_rotary_factor": 0.5}
LLAMA4 = {"intermediate_size_mlp": 64, "no_rope_layers": [1, 0], "use_qk_norm": True}
GRIFFIN = {
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "attention_window_size": WINDOW,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "block_types": ["recurrent", "recurrent", "attention"],
}
RWKV = {f"{kind}_low_rank_dim": 8 for kind in ("a", "v", "gate", "decay")}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
    "full_attention_interval": 2,
}
LFM2 = {
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_ff_dim": 64,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
}
JAMBA = {
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}
FALCON = {"mamba_d_ssm": 64}
NEMOTRON_H = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_proj_bias": False,
    "ssm_state_size": 8,
    "hybrid_override_pattern": ["M", "*", "-"],
}
MULTI_QUERY = {**GPT, "num_key_value_heads": None}
STABLELM = {"use_qkv_bias": False, "partial_rotary_factor": 0.5, "qk_layernorm": True}
LONG = {"original_max_position_embeddings": 512}
LONG_MOE = {
    **LONG,
    "short_factor": [1.0] * 4,
    "long_factor": [1.0] * 4,
    "short_mscale": 1.0,
    "long_mscale": 1.0,
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MINISTRAL_ROPE = {**LONG, "rope_theta": 10_000.0, "llama_4_scaling_beta": 0.1}
OPENELM = {
    "num_transformer_layers": 2,
    "model_dim": 32,
    "ffn_dim_divisor": 8,
    "num_query_heads": [4, 4],
    "num_kv_heads": [2, 2],
    "ffn_multipliers": [2.0, 2.0],
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "sliding_window": WINDOW,
    "sliding_window_pattern": 2,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "tie_word_embeddings": True,
}
EXAONE4 = {"sliding_window": WINDOW, "sliding_window_pattern": "LG"}
BAICHUAN = {"sliding_window": WINDOW, "sliding_window_layers": [0], "conv_window": 2}
DBRX = {
    "d_model": 32,
    "n_layers": 2,
    "n_heads": 4,
    "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10_000.0},
}
GLM = {"rope_scaling": None, "partial_rotary_factor": 0.5}
LLAMA4 = {"intermediate_size_mlp": 64, "no_rope_layers": [1, 0], "use_qk_norm": True}
GRIFFIN = {
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "attention_window_size": WINDOW,
    "num_key_value_heads": 1,
    "num_hidden_layers": 3,
    "block_types": ["recurrent", "recurrent", "attention"],
}
RWKV = {f"{kind}_low_rank_dim": 8 for kind in ("a", "v", "gate", "decay")}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
    "full_attention_interval": 2,
}
LFM2 = {
    "conv_bias": False,
    "conv_L_cache": 3,
    "block_dim": 32,
    "block_ff_dim": 64,
    "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0,
    "block_auto_adjust_ff_dim": False,
    "full_attn_idxs": [1],
}
JAMBA = {
    "attn_layer_offset": 1,
    "attn_layer_period": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "mamba_d_conv": 4,
    "mamba_d_state": 8,
    "mamba_expand": 2,
}
FALCON = {"mamba_d_ssm": 64}
NEMOTRON_H = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_proj_bias": False,
    "ssm_state_size": 8,
    "hybrid_override_pattern": ["M", "*", "-"],
}
