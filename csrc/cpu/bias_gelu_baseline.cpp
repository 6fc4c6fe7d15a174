#include "cpu/bias_gelu.h"
#define SIMMIM_FAST_LEVEL baseline
#include "cpu/bias_gelu_kernels.h"
