#include "cpu/residual_layer_norm.h"
#define SIMMIM_FAST_LEVEL baseline
#include "cpu/residual_layer_norm_kernels.h"
