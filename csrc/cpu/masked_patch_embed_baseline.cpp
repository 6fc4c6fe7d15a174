#include "cpu/masked_patch_embed.h"
#define SIMMIM_FAST_LEVEL baseline
#include "cpu/masked_patch_embed_kernels.h"
