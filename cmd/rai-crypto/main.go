// Rai-crypto encrypts secrets for raid.toml and decrypts them again:
//
//	rai-crypto encrypt -r DIR/host_key.pub 'redis://:password@host:6379/1'
//	echo -n 'password' | rai-crypto encrypt -r DIR/host_key.pub
//	rai-crypto encrypt -r host_key.pub --push ada@registry.example.edu < password
//	rai-crypto decrypt -i DIR/host_key age:…
//
// What it prints goes into raid.toml in the place of the secret, or, with --push, into a
// build file, a profile or RAI_PUSH in the place of a registry's password; raid reads it with its host key,
// whose public half `ssh-keyscan -p PORT HOST | cut -d" " -f2-` shows. Without an argument the secret is read from stdin, which keeps it out
// of the shell's history. The flags of RAI's rai-crypto are accepted; -s has no meaning.
package main

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/rai-project/raid/cmd/internal/cli"
	"github.com/rai-project/raid/keys/secret"
)

// buildTime is set by the linker: -X main.buildTime=2026-11-23T10:00:00Z.
var buildTime string

func main() {
	root := &cobra.Command{Use: "rai-crypto", Short: "Encrypts secrets for raid.toml", SilenceErrors: true, SilenceUsage: true}
	root.CompletionOptions.HiddenDefaultCmd = true
	f := root.PersistentFlags()
	f.StringP("secret", "s", "", "RAI's app secret; has no meaning any more")
	f.BoolP("color", "c", true, "accepted as in RAI")
	f.BoolP("verbose", "v", false, "accepted as in RAI")
	f.BoolP("debug", "d", false, "accepted as in RAI")
	root.AddCommand(encryptCommand(), decryptCommand(),
		&cobra.Command{Use: "version", Short: "Prints the version", Args: cobra.NoArgs,
			Run: func(cmd *cobra.Command, _ []string) {
				fmt.Fprintln(cmd.OutOrStdout(), "rai-crypto", cli.Built(buildTime))
			}})
	cli.Exit("rai-crypto", cli.PlainUsage(root).Execute(), cli.Input)
}

func encryptCommand() *cobra.Command {
	var to, push string
	cmd := &cobra.Command{
		Use: "encrypt [SECRET]", Short: "Encrypts a secret to raid's host key", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if to == "" {
				return cli.Usagef("-r DIR/host_key.pub, from raid's state folder", "no public key named")
			}
			public, err := os.ReadFile(to)
			if err != nil {
				return err
			}
			return filter(cmd, args, func(text string) (string, error) {
				if user, registry, ok := strings.Cut(push, "@"); ok {
					text = secret.Bind(text, secret.Push(user, registry))
				} else if push != "" {
					return "", cli.Usagef("it looks like: --push ada@registry.example.edu", "--push %s", push)
				}
				return secret.Encrypt(text, string(public))
			})
		},
	}
	cmd.Flags().StringVarP(&to, "recipient", "r", "", "raid's host_key.pub")
	cmd.Flags().StringVar(&push, "push", "", "USER@REGISTRY: for a build file; raid uses it for that user's pushes to that registry and nothing else")
	return cmd
}

func decryptCommand() *cobra.Command {
	var with string
	cmd := &cobra.Command{
		Use: "decrypt [age:…]", Short: "Decrypts a secret with raid's host key", Args: cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if with == "" {
				return cli.Usagef("-i DIR/host_key, from raid's state folder", "no private key named")
			}
			private, err := os.ReadFile(with)
			if err != nil {
				return err
			}
			return filter(cmd, args, func(text string) (string, error) {
				if !secret.Is(text) {
					return "", fmt.Errorf("this is no secret of raid's: it does not begin with %q", secret.Prefix)
				}
				return secret.Decrypt(text, private)
			})
		},
	}
	cmd.Flags().StringVarP(&with, "identity", "i", "", "raid's host_key")
	return cmd
}

// filter prints what fn makes of the argument, or of stdin less its last newline.
func filter(cmd *cobra.Command, args []string, fn func(string) (string, error)) error {
	text := strings.Join(args, "")
	if len(args) == 0 {
		b, err := io.ReadAll(cmd.InOrStdin())
		if err != nil {
			return err
		}
		text = strings.TrimSuffix(string(b), "\n")
	}
	out, err := fn(text)
	if err == nil {
		_, err = fmt.Fprintln(cmd.OutOrStdout(), out)
	}
	return err
}
