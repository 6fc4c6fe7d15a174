// Reads "major registers shared warps  max_warps max_registers max_shared max_shared_of_block" a line; prints how many
// such blocks a multiprocessor holds by NVIDIA's own calculator.
#include <cuda_occupancy.h>

#include <iostream>

int main() {
  int major, registers, shared, warps, max_warps, max_registers, max_shared, max_shared_of_block;
  while (std::cin >> major >> registers >> shared >> warps >> max_warps >> max_registers >> max_shared >>
         max_shared_of_block) {
    cudaOccDeviceProp device;
    device.computeMajor = major;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * max_warps;
    device.regsPerBlock = device.regsPerMultiprocessor = max_registers;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 * 1024;
    device.sharedMemPerMultiprocessor = max_shared;
    device.sharedMemPerBlockOptin = max_shared_of_block;
    device.reservedSharedMemPerBlock = 1024;
    device.numSms = 1;

    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.sharedSizeBytes = 0;
    function.partitionedGCConfig = PARTITIONED_GC_OFF;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = max_shared_of_block;
    function.numBlockBarriers = 1;

    cudaOccDeviceState state;
    state.carveoutConfig = 100;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, 32 * warps, shared)) return 1;
    std::cout << result.activeBlocksPerMultiprocessor << "\n";
  }
}
