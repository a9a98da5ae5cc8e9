import sys; sys.path.insert(0,"tests")
import torch, time, cProfile, pstats
torch.set_num_threads(1)
from conftest import tiny_model
from oracle import stock_of
import copy
m=tiny_model("streaming", num_hidden_layers=30)
ids=torch.randint(3,97,(1,20))
def run(model, n=60, **kw):
    with torch.no_grad():
        t=time.process_time(); model.generate(ids,max_new_tokens=n,min_new_tokens=n,do_sample=False,return_dict_in_generate=True,**kw); return (time.process_time()-t)/n*1e3
s=stock_of(m)
for _ in range(2):
    a=[run(s) for _ in range(3)]; b=[run(m) for _ in range(3)]; c=[run(m,output_attention_stats=True) for _ in range(3)]
    print("per step ms: stock sdpa %.2f streaming off %.2f on %.2f"%(min(a),min(b),min(c)))
m.set_attn_implementation("sdpa")
c=[run(m,output_attention_stats=True) for _ in range(3)]; b=[run(m) for _ in range(3)]; print("sdpa observed %.2f off %.2f"%(min(c),min(b)))
m.set_attn_implementation("streaming")
p=cProfile.Profile(); p.enable(); run(m,output_attention_stats=True); p.disable()
pstats.Stats(p).sort_stats("cumtime").print_stats("llama_attn")
