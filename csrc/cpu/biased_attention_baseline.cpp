#include "cpu/biased_attention.h"
#define SIMMIM_FAST_LEVEL baseline
#include "cpu/biased_attention_kernels.h"
