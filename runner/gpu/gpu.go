// Package gpu says which GPUs this machine has. It asks nvidia-smi and nothing
// else: no cgo, and a script of that name on PATH is all a test needs.
package gpu

// A Device is one GPU that can be handed to a box. UUID, never Index, is its
// identity: indices move between boots.
type Device struct {
	Index    int // nvidia-smi's; /dev/nvidia<Minor> is the node
	Minor    int
	UUID     string
	Model    string
	MemoryMB int64
	Driver   string
}
