// Command raid is the service and its runners in one static binary:
//
//	raid serve --state DIR --listen ADDR      the SSH service, with its local runners
//	raid runner --state DIR                   one runner
//	raid doctor                               what the machine lacks for the two
//	raid backup --state DIR --to DIR          a copy of all that is kept, while it runs
//	raid migrate --from STORE --to STORE      the queue moves to Redis, or back
//	raid shim                                 PID 1 of a box; runners start it
//
// Only this package knows flags and raid.toml.
package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/runner/shim"
	"github.com/rai-project/raid/sshd"
)

// buildTime is set by the Makefile with -ldflags -X.
var buildTime string

func main() {
	if len(os.Args) > 1 && os.Args[1] == "shim" { // before anything else: a box counts its milliseconds
		os.Exit(shim.Main(os.Args[2:]...))
	}
	cli.Exit("raid", cli.PlainUsage(root()).Execute(), 1)
}

func root() *cobra.Command {
	cmd := &cobra.Command{
		Use:           "raid",
		Short:         "SSH-native remote builds for GPU classes and labs",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	cmd.CompletionOptions.HiddenDefaultCmd = true
	cmd.AddCommand(serveCommand(), runnerCommand(), doctorCommand(), simulateCommand(), backupCommand(), migrateCommand(),
		&cobra.Command{Use: "version", Short: "which raid this is", Args: cobra.NoArgs,
			Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version()) }},
		&cobra.Command{Use: "buildtime", Short: "when this raid was built", Args: cobra.NoArgs,
			Run: func(cmd *cobra.Command, _ []string) { fmt.Fprintln(cmd.OutOrStdout(), version().BuildTime) }})
	return cmd
}

// version says which raid this is.
func version() sshd.Version {
	b := cli.Built(buildTime)
	return sshd.Version{Version: b.Version, Commit: b.Commit, BuildTime: b.Time, Go: b.Go}
}
