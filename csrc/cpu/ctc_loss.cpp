#include "cpu/kernels.h"
namespace kdkernels { namespace KDKERNELS_TARGET {
int64_t ctc_loss_workspace(int64_t,int64_t,int64_t,int64_t,int64_t,int64_t){return 0;}
void ctc_loss_forward(int64_t,int64_t,int64_t,const void*,int64_t,int64_t,int64_t,const int64_t*,const int64_t*,const int64_t*,const int64_t*,int64_t,int64_t,const void*,int64_t,const void*,int64_t,int64_t,int64_t,const uint8_t*,const void*,const void*,double,double,int64_t,double,void*,void*,void*,int64_t,int64_t,void*,int64_t,int64_t,void*,int64_t){}
}}
